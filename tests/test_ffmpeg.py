"""What is no video, damaged, cut, encrypted, huge or slow is refused in one sentence. No ffmpeg is left."""

import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
from conftest import ROOT, message, random_model
from PIL import Image
from videos import X264, container, crc, ffmpeg, make

import engine.ffmpeg
import engine.video
from engine.checkpoint import save_checkpoint
from engine.files import DataError
from engine.video import count_packets, decode_frames, duration, every_frame

# ---- damaged, cut short, encrypted


@pytest.mark.parametrize(
    "name", ["b-frames.avi", "open-gop.mkv", "vp9.webm", "h264.flv", "wmv2.wmv", "fast.mp4"]
)
@pytest.mark.parametrize("short", [0, 2**30])
def test_a_file_cut_short_is_refused(name, short, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", short)
    whole = make(tmp_path / name, f"{X264} -movflags faststart") if name == "fast.mp4" else container(name)
    content, path = whole.read_bytes(), tmp_path / f"cut-{name}"
    for part in (0.6, 0.9):
        path.write_bytes(content[: int(len(content) * part)])
        for window in ((), (0.0, 7.9)):
            assert f"{path} is truncated" in message(decode_frames, path, 3, *window)
        assert f"{path} is truncated" in message(count_packets, path)


def test_a_cut_recording_that_declares_no_length_is_read(tmp_path):
    """MPEG-TS, MPEG-PS, OGG and GIF: nobody can know (docs/data.md)."""
    for name in ("long-gop.ts", "mpeg2.mpg", "theora.ogv", "anim.gif"):
        content = container(name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * 0.6)])
        assert len(decode_frames(tmp_path / name, 3)) == 3


def test_sound_that_goes_on_is_not_a_cut_video(tmp_path, monkeypatch):
    path = tmp_path / "talk.flv"
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=size=96x64:duration=2", "-f", "lavfi", "-i", "sine=duration=9", path
    )
    for short in (0, 2**30):
        monkeypatch.setattr(engine.video, "SHORT_FILE", short)
        assert len(decode_frames(path, 3)) == 3


@pytest.mark.parametrize("name", ["b-frames.mp4", "open-gop.mkv"])
@pytest.mark.parametrize("short", [0, 2**30])
def test_one_bad_frame_of_hundreds_is_counted_and_many_are_refused(name, short, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", short)
    for bad, path in (
        ("eq(n\\,103)", tmp_path / f"one-{name}"),
        ("eq(mod(n\\,5)\\,3)", tmp_path / f"many-{name}"),
    ):
        noise = f"noise=amount=if({bad}\\,1\\,1e9)"  # every byte of these packets
        ffmpeg("-i", container(name), "-c", "copy", "-bsf:v", noise, path)
    with pytest.warns(UserWarning, match=rf"one-{name}: [1-6] of 200 frames"):
        assert len(decode_frames(tmp_path / f"one-{name}", 3)) == 3
    assert f"many-{name} is damaged" in message(decode_frames, tmp_path / f"many-{name}", 3)


@pytest.mark.parametrize("short", [0, 2**30])
def test_an_encrypted_video_is_refused_as_encrypted(tmp_path, short, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", short)
    key = "-encryption_scheme cenc-aes-ctr -encryption_key {0} -encryption_kid {0}".format("01" * 16)
    path = make(tmp_path / "drm.mp4", f"{X264} {key}")
    assert f"{path} is encrypted (DRM)" in message(decode_frames, path, 3)


def test_changed_bytes_give_frames_or_one_sentence(tmp_path):
    draw = random.Random(0)
    for name in ("b-frames.mp4", "open-gop.mkv", "b-frames.avi", "long-gop.ts"):
        for _ in range(4):
            content = bytearray(container(name).read_bytes())
            for _ in range(draw.choice([1, 30])):
                content[draw.randrange(min(len(content), draw.choice([2000, 10**9])))] = draw.randrange(256)
            (tmp_path / name).write_bytes(content)
            try:
                with warnings.catch_warnings(action="ignore"):
                    assert len(decode_frames(tmp_path / name, 3)) == 3
            except DataError as error:
                assert name in str(error) and "\n" not in str(error)


# ---- names, kinds of files, ffmpeg itself


NAMES = [
    "partial file",
    "3 decode errors",
    "File ended prematurely",
    "a\n[mov @ 0x1] partial file",
    "a'b\"c$d%s|e",
    "caf\udce9",
]


@pytest.mark.parametrize("name", NAMES)
def test_words_in_a_name_or_a_title_are_not_messages_of_ffmpeg(name, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", 0)
    folder = tmp_path / name
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system does not take this name")
    path = folder / f"{name}.mp4"
    path.write_bytes(container("b-frames.mp4").read_bytes())
    assert len(decode_frames(path, 2)) == 2
    title = name.encode(errors="replace").decode()
    titles = ["-metadata", f"title={title}", "-metadata", f"comment={title}"]
    ffmpeg("-i", container("b-frames.mp4"), "-c", "copy", *titles, tmp_path / "titled.mp4")
    assert len(decode_frames(tmp_path / "titled.mp4", 2)) == 2


def test_a_playlist_is_no_video_and_leads_nowhere(tmp_path):
    good = tmp_path / "good.mp4"
    good.write_bytes(container("b-frames.mp4").read_bytes())
    texts = {
        "ffconcat": "ffconcat version 1.0\n" + "file good.mp4\n" * 1000,
        "absolute": f"ffconcat version 1.0\nfile '{good}'\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:8,\nfile:{good}\n#EXT-X-ENDLIST\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
        f'<Representation id="0" bandwidth="1"><BaseURL>{good}</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "subtitles": "1\n00:00:01,000 --> 00:00:04,000\nhello\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.mp4").write_text(text)
        started = time.monotonic()
        assert f"{name}.mp4 holds no readable video" in message(decode_frames, tmp_path / f"{name}.mp4", 2)
        assert "holds no readable video" in message(duration, tmp_path / f"{name}.mp4")
        assert time.monotonic() - started < 10


def test_a_picture_or_a_deeply_nested_file_named_mp4_is_no_video(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "picture.mp4")
    nested = b"".join((8 * (5000 - n)).to_bytes(4, "big") + b"moov" for n in range(5000))
    (tmp_path / "nested.mp4").write_bytes(b"\0\0\0\x14ftypisom\0\0\0\0isom" + nested)
    for name in ("picture.mp4", "nested.mp4"):
        assert "holds no readable video" in message(decode_frames, tmp_path / name, 2)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to("gone.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for name, words in {
        "pipe.mp4": "a folder, pipe or device, not a video file",
        "folder.mp4": "a folder, pipe or device, not a video file",
        "link.mp4": "not found",
        "loop.mp4": "cannot be opened (Too many levels of symbolic links)",
        "a\0b.mp4": "cannot be opened",
        "x" * 300 + ".mp4": "cannot be opened (File name too long)",
    }.items():
        for function in (count_packets, duration, lambda path: decode_frames(path, 2)):
            text = message(function, tmp_path / name)
            assert words in text and "\n" not in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_the_right_to_read_it_is_refused(tmp_path):
    path = tmp_path / "secret.mp4"
    path.write_bytes(container("b-frames.mp4").read_bytes())
    path.chmod(0)
    assert "cannot be opened (Permission denied)" in message(decode_frames, path, 2)


def test_a_file_that_is_deleted_meanwhile_is_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", 0)
    path, run = tmp_path / "gone.mp4", engine.video.Run
    path.write_bytes(container("b-frames.mp4").read_bytes())
    expected = [crc(frame) for frame in decode_frames(container("b-frames.mp4"), 3)]
    monkeypatch.setattr(engine.video, "Run", lambda *all: path.unlink(missing_ok=True) or run(*all))
    assert [crc(frame) for frame in decode_frames(path, 3)] == expected and not path.exists()


@pytest.mark.parametrize(
    "says,words",
    [("ffmpeg version 4.2.2-static x", "ffmpeg 4.2.2-static, which is too old"), (None, "no working ffmpeg")],
)
def test_an_ffmpeg_that_is_too_old_or_does_not_run_is_named(says, words, tmp_path, monkeypatch):
    fake = tmp_path / "ffmpeg"
    fake.write_text(f"#!/bin/sh\necho {says}\n" if says else "nothing to run")
    fake.chmod(0o755 if says else 0o644)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    assert words in message(decode_frames, container("b-frames.mp4"), 2)


# ---- limits


def test_frames_above_the_limit_of_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(engine.ffmpeg, "max_pixels", 96 * 64 - 1)
    for name in ("b-frames.mp4", "anim.gif"):
        text = message(decode_frames, container(name), 2)
        assert f"{name} has frames of 96 x 64 pixels, more than the limit of 6,143" in text


def test_a_large_picture_of_few_bytes_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.gif"
    path.write_bytes(
        b"GIF89a"
        + (16000).to_bytes(2, "little") * 2
        + b"\x80\0\0\0\0\0\xff\xff\xff"
        + b"\x2c\0\0\0\0"
        + (16000).to_bytes(2, "little") * 2
        + b"\0\x02\x02\x44\x01\0;"
    )
    assert "has frames of 16000 x 16000 pixels" in message(decode_frames, path, 2)


def test_large_frames_are_decoded_one_file_at_a_time(monkeypatch):
    path, locked = container("b-frames.mp4"), []
    expected = [crc(frame) for frame in decode_frames(path, 3)]
    keep = engine.video._decode
    monkeypatch.setattr(engine.video, "LARGE", 1000)
    monkeypatch.setattr(
        engine.video, "_decode", lambda *all: locked.append(engine.video._one_large.locked()) or keep(*all)
    )
    assert [crc(frame) for frame in decode_frames(path, 3)] == expected
    assert locked == [False, True] and not engine.video._one_large.locked()


def test_a_file_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(engine.ffmpeg, "time_limit", -1000.0)
    assert "takes longer to decode than" in message(decode_frames, container("b-frames.mp4"), 2)


@pytest.mark.parametrize("command", ["data check", "data cache", "search index", "train", "evaluate"])
def test_each_command_that_reads_videos_has_flags_for_the_limits(command, tmp_path, monkeypatch, capsys):
    for name in ("max_pixels", "time_limit"):  # restored in the end
        monkeypatch.setattr(engine.ffmpeg, name, getattr(engine.ffmpeg, name))
        monkeypatch.setenv(f"TMASS_{name.upper()}", "1")
    for split in ("train", "val", "test"):
        shutil.copy(container("b-frames.mp4"), tmp_path / f"{split}.mp4")
    rows = [f"{split}.mp4,words,{split}" for split in ("train", "val", "test")]
    (tmp_path / "rows.csv").write_text("\n".join(["video,caption,split", *rows]))
    source = ["--dataset", "csv", "--annotations", f"{tmp_path}/rows.csv", "--videos", str(tmp_path)]
    source += ["--data", f"{tmp_path}/data"]
    module, *rest = command.split()
    if module == "search":
        rest += [str(tmp_path), "--arch", "tiny", "--library", f"{tmp_path}/library.db"]
    elif module == "evaluate":
        model = random_model()
        save_checkpoint(tmp_path / "run" / "best.pt", model)
        rest += ["--checkpoint", f"{tmp_path}/run", *source]
    else:
        rest += source if module == "data" else [*source, "--arch", "tiny", "--out", f"{tmp_path}/run"]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main([*rest, "--max-pixels", "6143"])
    said = "".join(capsys.readouterr()) + str(ended.value.code)
    assert os.environ["TMASS_MAX_PIXELS"] == "6143"
    if command != "data check":  # it counts packets, and decodes none
        assert "more than the limit of 6,143: raise --max-pixels" in said and ended.value.code != 0


def test_frames_are_read_one_by_one_and_resized_at_once(tmp_path, monkeypatch):
    """24 frames of 1280 x 720 are 63 MiB; two of them are 5 MiB."""
    monkeypatch.setattr(engine.video, "SHORT_FILE", 0)
    path = make(tmp_path / "a.mp4", X264, "testsrc2=size=1280x720:rate=25:duration=1")
    tracemalloc.start()
    try:
        decode_frames(path, 24, size=32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20


def test_a_side_a_hundred_times_the_other_is_refused(tmp_path):
    long = make(tmp_path / "long.mkv", "-c:v ffv1", "color=red:size=777x1:duration=1")
    assert "is 777 x 1 pixels" in message(decode_frames, long, 2)
    wide = make(tmp_path / "wide.mkv", "-c:v ffv1", "color=red:size=700x10:duration=1")
    assert decode_frames(wide, 1, size=32)[0].shape == (32, 2240, 3)


# ---- no ffmpeg is left


def children() -> set[int]:
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "ffmpeg"], capture_output=True, text=True)
    return set(map(int, found.stdout.split()))


def test_no_ffmpeg_is_left_when_reading_stops_early(monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", 0)
    before = children()
    next(frames := every_frame(container("b-frames.mp4")))
    assert children() - before
    frames.close()

    def interrupted(frame, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.video, "resize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_frames(container("b-frames.mp4"), 3, size=32)
    assert not children() - before and not engine.ffmpeg._running


SLOW = """#!/bin/sh
[ "$1" = -version ] && echo ffmpeg version 9.0 && exit
echo $$ >> {folder}/pids
exec sleep 60
"""


def test_ctrl_c_ends_each_ffmpeg_and_the_program_at_once(tmp_path):
    (tmp_path / "ffmpeg").write_text(SLOW.format(folder=tmp_path))
    (tmp_path / "ffmpeg").chmod(0o755)
    (tmp_path / "a.mp4").write_bytes(b"a video")
    code = """
from pathlib import Path
from engine.datasets import Clip
from engine.frames import FrameCache
clips = [Clip(str(n), Path("a.mp4"), ("a caption",), "train") for n in range(50)]
FrameCache(Path("cache"), 4, 32).fill(clips)
"""
    env = {**os.environ, "IMAGEIO_FFMPEG_EXE": str(tmp_path / "ffmpeg"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    pids = (tmp_path / "pids").read_text().split()
    assert 1 <= len(pids) <= os.cpu_count() and not any(Path(f"/proc/{pid}").exists() for pid in pids)
