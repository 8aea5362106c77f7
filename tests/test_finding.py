"""Videos are found by name, in whatever form the name is written; and never another video."""

import unicodedata

import pytest
from conftest import message

from engine.finding import Files


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a video")


def test_videos_are_found_in_any_subfolder_and_with_another_extension(tmp_path):
    names = ("deep/er/a.mp4", "b.mov", "x/c.mp4", "y/c.mp4", "__MACOSX/._a.mp4")
    touch(*(tmp_path / name for name in names))
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    files = Files(tmp_path)
    found = {"a.mp4": "deep/er/a.mp4", "b.avi": "b.mov", "y/c.mp4": "y/c.mp4", "gone.mp4": "gone.mp4"}
    assert {name: files.video(name) for name in found} == {
        name: tmp_path / own for name, own in found.items()
    }
    assert "keep one of them" in message(files.video, "c.mp4")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_a_name_is_found_in_another_unicode_form(tmp_path, form, written):
    """A Mac writes é as two characters."""
    name = unicodedata.normalize(form, "straße/café ガ.mp4")
    touch(tmp_path / name)
    files = Files(tmp_path)
    for wanted in ("straße/café ガ.mp4", "café ガ.mp4", "café ガ", "café ガ.avi"):
        assert files.video(unicodedata.normalize(written, wanted)) == tmp_path / name


def test_a_name_as_written_wins_over_its_other_form(tmp_path):
    both = [unicodedata.normalize(form, "é.mp4") for form in ("NFC", "NFD")]
    touch(*(tmp_path / name for name in both))
    files = Files(tmp_path)
    assert [files.video(name).name for name in both] == both
    assert "keep one of them" in message(files.video, "é")


def test_blanks_around_a_name_do_not_count(tmp_path):
    touch(tmp_path / " a.mp4", tmp_path / "b .mp4", tmp_path / "c.mp4 ", tmp_path / "d e.mp4")
    files = Files(tmp_path)
    found = {"a": " a.mp4", "a.mp4": " a.mp4", " b": "b .mp4", "c.mp4": "c.mp4 ", " d e.mp4 ": "d e.mp4"}
    assert {name: files.video(name).name for name in found} == found


def test_a_name_with_a_folder_does_not_find_the_video_of_another_folder(tmp_path):
    touch(*(tmp_path / name for name in ("cat/1.mp4", "cat/2.mp4", "old/dog/2.mp4", "3.mp4")))
    files = Files(tmp_path)
    found = {
        "dog/1.mp4": "dog/1.mp4",  # where it is missing
        "dog/2": "old/dog/2.mp4",
        "cat/2": "cat/2.mp4",
        "/home/me/videos/cat/2.mp4": "cat/2.mp4",
        "./cat/1": "cat/1.mp4",
        "videos/3.mp4": "3.mp4",
        "1.mp4": "cat/1.mp4",
    }
    assert {name: str(files.video(name).relative_to(tmp_path)) for name in found} == found
    assert files.video("1.mp4", folder="dog") == tmp_path / "cat" / "1.mp4"  # it may be in any folder
    assert files.video("4.mp4", folder="dog") == tmp_path / "dog" / "4.mp4"


def test_a_link_to_nothing_is_taken_only_where_there_is_no_video(tmp_path):
    touch(tmp_path / "x" / "a.mp4", tmp_path / "b.avi")
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).symlink_to("gone.mp4")
    files = Files(tmp_path)
    found = {
        "a.mp4": "x/a.mp4",
        "a": "x/a.mp4",
        "b.mp4": "b.avi",
        "b": "b.avi",
        "c": "c.mp4",
        "c.mp4": "c.mp4",
    }
    assert {name: files.video(name) for name in found} == {
        name: tmp_path / path for name, path in found.items()
    }
    assert files.is_video("a") and not files.is_video("c") and not files.is_video("d")


@pytest.mark.parametrize("name", ["a\0.mp4", "\ud800.mp4", "x" * 300, "", ".", "/", "a/../../b"])
def test_a_name_that_no_file_can_have_is_missing(tmp_path, name):
    touch(tmp_path / "v.mp4")
    assert not Files(tmp_path).is_video(name)
