import os
import socket
import subprocess
import sys

import pytest
import torch

from engine.files import (
    DataError,
    ModelError,
    files_below,
    not_found,
    printable,
    remove_leftovers,
    stem,
    write_atomic,
    writing,
)


@pytest.mark.parametrize(
    "name,base",
    [
        ("video0.mp4", "video0"),
        (
            "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675.avi",
            "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675",
        ),
        (
            "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675",
            "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675",
        ),
        ("65430553@N08_7624593376_420700bd90.", "65430553@N08_7624593376_420700bd90"),
        ("65430553@N08_7624593376_420700bd90..mp4", "65430553@N08_7624593376_420700bd90"),
        ("-4wsuPCjDBc_5_15.AVI", "-4wsuPCjDBc_5_15"),
        ("150E6.mp4", "150E6"),
        ("loop.apng", "loop"),
    ],
)
def test_a_stem_keeps_the_dots_of_a_name(name, base):
    assert stem(name) == base


def test_files_below_follows_links_once_and_skips_macos_metadata(tmp_path):
    for name in ("b/two.mp4", "a/one.mp4", "a/._one.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    outside.mkdir()
    (outside / "three.mp4").touch()
    (tmp_path / "c").symlink_to(outside)
    assert [path.name for path in files_below(tmp_path)] == ["one.mp4", "two.mp4", "three.mp4"]


def test_what_is_not_found_may_be_a_link(tmp_path):
    (tmp_path / "a.mp4").symlink_to("gone.mp4")
    advice = "not found: add the file or delete its rows."
    assert not_found(tmp_path / "a.mp4") == f"{tmp_path / 'a.mp4'} (a link to gone.mp4) {advice}"
    assert not_found(tmp_path / "b.mp4") == f"{tmp_path / 'b.mp4'} {advice}"


def test_names_that_are_not_utf8_can_be_printed():
    assert printable("ring " + os.fsdecode(b"\xff")) == "ring ?" and printable("日本") == "日本"


def test_write_atomic_takes_bytes_or_a_function_and_creates_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_atomic(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomic(path, lambda file: torch.save({"x": 2}, file))
    assert torch.load(path) == {"x": 2} and [*path.parent.iterdir()] == [path]


class Stopped(BaseException):
    """As KeyboardInterrupt."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("broken"), Stopped()])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise error

    with pytest.raises(Stopped if isinstance(error, Stopped) else OSError):
        write_atomic(path, write)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_the_reason_behind_an_error_of_torch_save_is_kept(tmp_path):
    def write(file):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904, as torch.save does

    with pytest.raises(OSError) as error:
        write_atomic(tmp_path / "file", write)
    assert error.value.errno == 28


@pytest.mark.parametrize("kind", [DataError, ModelError])
def test_writing_says_what_could_not_be_written_why_and_what_to_do(tmp_path, kind):
    (tmp_path / "file").write_text("not a folder")
    path = tmp_path / "file" / "below"
    with pytest.raises(kind) as error, writing(path, kind, "make room."):
        write_atomic(path, b"")
    assert str(error.value) == f"{path} could not be written (Not a directory): make room."


def test_leftovers_of_ended_processes_of_this_machine_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    names = [
        f"a.{here}.{ended.pid}.part",
        f"a.{here}.{os.getpid()}.part",
        f"a.other.{ended.pid}.part",
        "a.part",
    ]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
