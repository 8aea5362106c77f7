"""engine/folder.py: which videos of a folder are taken, left out, or cannot be reached now."""

import os
from pathlib import Path

import pytest
from conftest import message

from engine.folder import PRIVATE, Folder, is_video, scan


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def refuse(monkeypatch):
    """Makes a function of os raise an error for one path, as a disk or a missing right does."""

    def patch(function: str, path: Path, error: OSError) -> None:
        real = getattr(os, function)

        def refusing(given, *arguments, **options):
            if os.fspath(given) == os.fspath(path):
                raise error
            return real(given, *arguments, **options)

        monkeypatch.setattr(os, function, refusing)

    return patch


# ---- what is taken


def test_videos_are_found_at_any_depth_in_order_and_each_folder_once(tmp_path):
    names = ["A.MP4", "b.mp4", "26292851@N04.", "deep/er/c.webm", "deep/d.gif", "z/e.ts.mkv"]
    root = touch(tmp_path / "videos", *names, "notes.txt", "mp4", "._b.mp4", "deep/x.mp4/f.avi")
    (root / "loop").symlink_to(root)
    (root / "a link").symlink_to(root / "z")  # sorts before z, which keeps its own name
    found = scan(root)
    assert {*found.videos} == {*names, "deep/x.mp4/f.avi"} and [*found.videos] == [*scan(root).videos]
    assert (found.left_out, found.outside, found.dangling, found.unreadable) == (0, 0, {}, {})
    assert found.videos["b.mp4"] == (root / "b.mp4").stat()


def test_a_name_is_that_of_a_video_by_its_suffix():
    assert all(map(is_video, ("a.mp4", "A.MOV", "x.y.m2ts", "26292851@N04.")))
    assert not any(map(is_video, ("mp4", "a.mp4.part", "a.txt", "a.jpg", "mp4.d")))


def test_links_are_followed_and_counted_where_they_lead_out_of_the_folder(tmp_path):
    root, other = (
        touch(tmp_path / "videos", "in/a.mp4"),
        touch(tmp_path / "videos and more", "b.mp4", "c/d.mp4"),
    )
    (root / "inside.mp4").symlink_to(root / "in" / "a.mp4")
    (root / "outside.mp4").symlink_to(other / "b.mp4")
    (root / "disk").symlink_to(other / "c")
    found = scan(root)
    assert {*found.videos} == {"in/a.mp4", "inside.mp4", "outside.mp4", "disk/d.mp4"} and found.outside == 2
    (tmp_path / "way in").symlink_to(root)
    assert scan(tmp_path / "way in").outside == 2


# ---- what is left out


PRIVATE_NAMES = [
    ".Trash-1000", ".Trashes", ".trash", ".hidden", ".thumbnails", ".dropbox.cache", "#recycle", "#snapshot",
    "@eaDir", "@Recycle", "@Recently-Snapshot", "~snapshot", "$RECYCLE.BIN", "RECYCLER", "Recycle Bin",
    "Trash", "trash-1000", "lost+found", "System Volume Information", "Thumbnails", "thumbs",
    "files_trashbin",
]  # fmt: skip
OPEN_NAMES = [
    "trash metal", "Recycled art", "thumb war", "snapshots", "#beach", "@home", "2024.06", "trash can race",
    "_raw", "lost", "Thumbelina",
]  # fmt: skip


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_hidden_trash_and_thumbnail_folders_are_left_out_and_counted(name, tmp_path):
    root = touch(tmp_path, "a.mp4", f"{name}/private.mp4", f"{name}/deep/er/private.mp4", f"b/{name}/c.mp4")
    found = scan(root)
    assert [*found.videos] == ["a.mp4"] and found.left_out == 3
    assert len(scan(root, hidden=True).videos) == 4 and scan(root, hidden=True).left_out == 0
    assert [*scan(root / name).videos] == [
        "private.mp4",
        "deep/er/private.mp4",
    ]  # when it is asked for by name


def test_other_names_are_taken(tmp_path):
    assert not [name for name in OPEN_NAMES if PRIVATE.fullmatch(name)]
    root = touch(tmp_path, *(f"{name}/a.mp4" for name in OPEN_NAMES))
    assert len(scan(root).videos) == len(OPEN_NAMES)


def test_hidden_files_and_folders_marked_by_android_are_left_out(tmp_path):
    root = touch(
        tmp_path, ".trashed-1700000000-b.mp4", "Sent/.nomedia", "Sent/deep/c.mp4", ".nomedia", "a.mp4"
    )
    assert [*scan(root).videos] == ["a.mp4"] and scan(root).left_out == 2  # the folder itself is asked for
    assert len(scan(root, hidden=True).videos) == 3


def test_a_folder_that_is_also_reached_by_a_hidden_link_is_taken(tmp_path):
    root = touch(tmp_path, "z/a.mp4", ".hidden/b.mp4")
    (root / ".first").symlink_to(root / "z")
    assert [*scan(root).videos] == ["z/a.mp4"] and scan(root).left_out == 1


def test_a_hidden_folder_that_cannot_be_read_is_not_worth_a_word(tmp_path, refuse):
    root = touch(tmp_path, "a.mp4", "lost+found/b.mp4")
    (root / ".broken.mp4").symlink_to("nothing")
    refuse("scandir", root / "lost+found", PermissionError(13, "Permission denied"))
    found = scan(root)
    assert [*found.videos] == ["a.mp4"] and not found.unreadable and not found.dangling


# ---- what cannot be reached


@pytest.mark.parametrize(
    ("function", "path", "error"),
    [
        ("scandir", "sub", PermissionError(13, "Permission denied")),
        ("scandir", "sub", OSError(5, "Input/output error")),
        ("stat", "sub/b.mp4", PermissionError(13, "Permission denied")),  # a folder that can be listed only
    ],
)
def test_a_folder_that_cannot_be_read_keeps_its_files(function, path, error, tmp_path, refuse):
    root = touch(tmp_path, "a.mp4", "sub/b.mp4", "sub/deep/c.mp4", "subway/d.mp4")
    refuse(function, root / path, error)
    found = scan(root)
    assert {"a.mp4", "subway/d.mp4"} <= {*found.videos} and found.unreadable == {"sub": error.strerror}
    assert found.away("sub/b.mp4", "/") == found.away("sub/gone.mp4", "/") == "sub"
    assert found.away("gone.mp4", "/") is None and found.away("subway/gone.mp4", "/") is None
    assert found.why("sub") == f"{root / 'sub'} cannot be read ({error.strerror})"


def test_one_file_that_cannot_be_read_is_kept_alone(tmp_path, refuse):
    root = touch(tmp_path, "sub/a.mp4", "sub/b.mp4")
    refuse("stat", root / "sub" / "b.mp4", OSError(116, "Stale file handle"))
    found = scan(root)
    assert [*found.videos] == ["sub/a.mp4"] and found.away("sub/b.mp4", "/") == "sub/b.mp4"


def test_the_folder_itself_must_be_readable(tmp_path, refuse):
    touch(tmp_path, "a.mp4")
    refuse("scandir", tmp_path, PermissionError(13, "Permission denied"))
    assert message(scan, tmp_path) == f"{tmp_path} cannot be read (Permission denied): name another folder."


def test_a_folder_that_is_removed_during_the_walk_is_gone(tmp_path, refuse):
    root = touch(tmp_path, "a.mp4", "sub/b.mp4")
    refuse("scandir", root / "sub", FileNotFoundError(2, "No such file or directory"))
    assert scan(root).away("sub/b.mp4", "/") is None and not scan(root).unreadable


def test_what_a_dangling_link_led_to_is_kept(tmp_path):
    root = touch(tmp_path / "videos", "a.mp4", "deep/b.mp4")
    for name, target in (
        ("disk", "/no/disk"),
        ("deep/c.mp4", "nothing"),
        ("d.mp4", "a.mp4/x"),
        ("e.mp4", "e.mp4"),
    ):
        (root / name).symlink_to(target)
    found = scan(root)
    assert [*found.videos] == ["a.mp4", "deep/b.mp4"] and not found.unreadable
    assert found.dangling == {
        "disk": "/no/disk",
        "deep/c.mp4": "nothing",
        "d.mp4": "a.mp4/x",
        "e.mp4": "e.mp4",
    }
    assert found.away("disk/x/y.mp4", "/") == "disk" and found.away("deep/c.mp4", "/") == "deep/c.mp4"
    assert found.why("disk") == f"{root / 'disk'} is a link to /no/disk, which is not there"
    (root / "disk").unlink()
    assert scan(root).away("disk/x/y.mp4", "/") is None


@pytest.mark.parametrize("linked", [False, True])
def test_files_of_a_disk_that_is_not_mounted_are_kept(linked, tmp_path, monkeypatch):
    root, disk = touch(tmp_path / "videos", "a.mp4"), tmp_path / "videos" / "usb"
    if linked:
        disk = tmp_path / "mnt"
        (root / "usb").symlink_to(disk)
    touch(disk, "b/c.mp4")
    mounted, real = [str(disk)], os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) in mounted or real(path))
    assert scan(root).mounts["usb/b/c.mp4"] == str(disk) != scan(root).mounts["a.mp4"]
    (disk / "b" / "c.mp4").unlink()
    (disk / "b").rmdir()
    assert scan(root).away("usb/b/c.mp4", str(disk)) is None  # the disk is there, the file is not
    mounted.clear()
    found = scan(root)
    assert found.away("usb/b/c.mp4", str(disk)) == "usb" and "not mounted" in found.why("usb")
    assert found.away("gone.mp4", scan(root).mounts["a.mp4"]) is None
    (root / "usb").unlink() if linked else disk.rmdir()
    assert scan(root).away("usb/b/c.mp4", str(disk)) is None  # who removes the folder means it


def test_without_a_known_disk_an_empty_folder_keeps_its_files(tmp_path):
    assert Folder(tmp_path).away("a.mp4", None) == "" and Folder(tmp_path).away("a.mp4", "/") is None
    assert scan(touch(tmp_path, "b.mp4")).away("a.mp4", None) is None


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    root = touch(tmp_path, "a.mp4")
    os.mkfifo(root / "b.mp4")
    found = scan(root)
    assert [*found.videos] == ["a.mp4"] and "pipe" in found.unreadable["b.mp4"]
