"""engine/scenes.py: files are cut into windows and scenes, on the frames that ffmpeg decodes."""

import sys
from pathlib import Path

import ffmpeg
import imageio_ffmpeg
import pytest
from conftest import message

from engine.scenes import MOST, scene_starts, spans


def film(path: Path, *scenes: tuple[str, float], size: str = "64x64", rate: str = "25", **options) -> Path:
    """A video of single colours, each shown for some seconds."""
    sources = [f"color={colour}:size={size}:rate={rate}:duration={seconds}" for colour, seconds in scenes]
    joined = ffmpeg.concat(*(ffmpeg.input(source, f="lavfi") for source in sources))
    joined.output(f"file:{path}", **options).run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    return path


@pytest.fixture(scope="module")
def five_seconds(tmp_path_factory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "film.mkv", ("red", 2), ("blue", 3))


def test_windows_divide_a_file_and_the_last_is_as_long_as_the_rest(five_seconds):
    assert spans(five_seconds, "whole") == spans(five_seconds, "window 60") == [(0.0, None)]
    assert spans(five_seconds, "window 2") == [(0.0, 2.0), (2.0, None)]
    assert spans(five_seconds, "window 1.6") == [(0.0, 1.6), (1.6, 3.2), (3.2, None)]
    assert 5 / 1e-5 > MOST and "use a larger --window" in message(spans, five_seconds, "window 1e-5")


def test_scenes_begin_where_the_picture_changes(five_seconds):
    pytest.importorskip("scenedetect", reason="pip install -r requirements-search.txt")
    assert spans(five_seconds, "scenes") == [(0.0, 2.0), (2.0, None)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("interlaced.mp4", dict(vcodec="libx264", flags="+ilme+ildct", x264opts="tff=1", pix_fmt="yuv420p")),
        ("12:30 party.mp4", {}),
        ("film.ts", {}),  # its clock starts at 1.4 s
        ("at 30000:1001.mp4", dict(r="30000/1001")),
    ],
)
def test_scenes_are_cut_on_the_frames_that_ffmpeg_gives(name, options, tmp_path, monkeypatch):
    pytest.importorskip("scenedetect", reason="pip install -r requirements-search.txt")
    film(tmp_path / name, ("red", 1), ("blue", 1), ("white", 0.2), ("red", 1), **options)
    monkeypatch.chdir(tmp_path)  # a relative name with a colon looks like an address
    found = scene_starts(Path(name))
    assert found == pytest.approx([0.0, 1.0, 2.0], abs=0.04)  # a scene has 15 frames or more


def test_a_frame_of_another_size_begins_a_scene(tmp_path):
    pytest.importorskip("scenedetect", reason="pip install -r requirements-search.txt")
    parts = [film(tmp_path / f"{n}.ts", ("red", 1), size=size) for n, size in enumerate(("64x64", "96x64"))]
    (tmp_path / "both.ts").write_bytes(b"".join(path.read_bytes() for path in parts))
    assert scene_starts(tmp_path / "both.ts") == pytest.approx([0.0, 1.0], abs=0.2)


def test_a_file_that_cannot_be_cut_gives_one_sentence(tmp_path, five_seconds, monkeypatch):
    (tmp_path / "bad.mkv").write_bytes(b"bad")
    for cut in ("window 2", "scenes"):
        assert "holds no readable video" in message(spans, tmp_path / "bad.mkv", cut)
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    assert "pip install -r requirements-search.txt" in message(scene_starts, five_seconds)
