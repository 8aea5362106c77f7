"""Videos as a player shows them: the right stream and frames, whole and in windows, in every container."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import message
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from videos import CONTAINERS, X264, assert_exact, container, crc, ffmpeg, make, reference

import engine.video
from engine.video import count_packets, decode_frames, duration, every_frame, resize, segment_midpoints


@given(st.integers(1, 5000), st.integers(1, 64))
def test_midpoints_are_the_middles_of_equal_segments(count, num_frames):
    numbers = segment_midpoints(count, num_frames)
    assert len(numbers) == num_frames and numbers == sorted(numbers)
    for k, n in enumerate(numbers):
        assert n <= (k + 0.5) * count / num_frames < n + 1 and 0 <= n < count


@pytest.mark.parametrize("num_frames", [1, 5, 12, 24, 40])
@pytest.mark.parametrize("short", [0, 2**30])
def test_frames_of_a_built_in_clip_are_exact(clips, num_frames, short, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", short)
    whole, _ = reference(clips[3].path)
    assert len(whole) == 24 and count_packets(clips[3].path) == 24
    found = [crc(frame) for frame in decode_frames(clips[3].path, num_frames)]
    assert found == [whole[n] for n in segment_midpoints(24, num_frames)]


def test_a_pass_that_holds_too_much_stops_and_two_follow(clips, monkeypatch):
    expected = [crc(frame) for frame in decode_frames(clips[3].path, 5)]
    monkeypatch.setattr(engine.video, "SHORT_PIPE", 10**5)
    assert [crc(frame) for frame in decode_frames(clips[3].path, 5)] == expected


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert all(np.array_equal(frame, pixels) for frame in decode_frames(tmp_path / "a.png", 3))
    assert decode_frames(tmp_path / "a.png", 3, size=10)[2].shape == (10, 14, 3)
    Image.new("RGB", (201, 2)).save(tmp_path / "long.png")
    assert "long.png is 201 x 2 pixels" in message(decode_frames, tmp_path / "long.png", 2)


# ---- every container


@pytest.mark.parametrize("name", CONTAINERS)
def test_whole_files_and_windows_are_exact_in_every_container(name, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", 0)
    assert_exact(container(name))


@pytest.mark.parametrize("name", ["b-frames.mp4", "long-gop.ts", "b-frames.avi", "sparse.mp4"])
def test_a_short_file_is_read_in_one_pass_with_the_same_frames(name, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", 2**30)
    monkeypatch.setattr(engine.video, "_probe", None)  # not called
    assert_exact(container(name))


def test_a_long_window_starts_near_it_and_not_at_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", 0)
    seeks, run = [], engine.video.Run
    monkeypatch.setattr(
        engine.video,
        "Run",
        lambda video, options, seek=None, *more: seeks.append(seek) or run(video, options, seek, *more),
    )
    new = shutil.copy(container("b-frames.mp4"), tmp_path)  # its packets are not known yet
    decode_frames(Path(new), 3, 5.0, 6.0)
    assert seeks == [None, 5.0, 5.0]  # packets, times, pixels


LONG = {
    "hevc.mp4": "-c:v libx265 -preset ultrafast -x265-params keyint=40:bframes=3:log-level=error:pools=none",
    "late.mp4": f"{X264} -g 40 -bf 2 -output_ts_offset 3",
    "negative.mkv": f"{X264} -g 40 -bf 3 -x264-params b-pyramid=normal -avoid_negative_ts disabled",
    "steps.mp4": f"{X264} -g 40 -bf 3 -vf setpts='N*(1+mod(N\\,3))' -fps_mode vfr",
}
IN_PARTS = {"b-frames.mp4", "open-gop.mkv", "fragmented.mp4", "h264.flv", "sparse.mp4", *LONG}


@pytest.mark.parametrize("name", [*CONTAINERS, *LONG, "edited.mp4"])
def test_frames_of_a_long_file_are_exact_although_only_parts_are_decoded(name, tmp_path, monkeypatch):
    """Limits are low here, so that files of 200 frames count as long. Other files are decoded whole."""
    for limit, value in (("SHORT_FILE", 0), ("SKIP", 1), ("HEAD", 5)):
        monkeypatch.setattr(engine.video, limit, value)
    decode_some, parts = engine.video._decode_some, []
    monkeypatch.setattr(engine.video, "_decode_some", lambda *a: parts.append(decode_some(*a)) or parts[-1])
    if name == "edited.mp4":  # starts between two key frames: an edit list hides the frames before
        path = tmp_path / name
        ffmpeg("-ss", 1.3, "-i", container("b-frames.mp4"), "-c", "copy", path)
    else:
        path = make(tmp_path / name, LONG[name]) if name in LONG else container(name)
    whole, _ = reference(path)
    for num_frames in (1, 2, 3):
        found = [crc(frame) for frame in decode_frames(path, num_frames)]
        assert found == [whole[n] for n in segment_midpoints(len(whole), num_frames)]
    assert any(parts) == (name in IN_PARTS)


def test_a_long_file_with_an_error_in_a_decoded_part_is_decoded_whole(tmp_path, monkeypatch):
    path, expected = tmp_path / "a.mp4", []
    content = bytearray(container("b-frames.mp4").read_bytes())
    content[len(content) // 10 : len(content) // 10 + 400] = bytes(400)  # in the first of four parts
    path.write_bytes(content)
    for skip in (2000, 1):
        for limit, value in (("SHORT_FILE", 0), ("HEAD", 5), ("SKIP", skip)):
            monkeypatch.setattr(engine.video, limit, value)
        with pytest.warns(UserWarning, match="damaged"):
            expected.append([crc(frame) for frame in decode_frames(path, 3)])
    assert expected[0] == expected[1]


def test_times_that_jump_in_a_recording_are_those_of_a_player(tmp_path, monkeypatch):
    """Two recordings one after the other: the second begins anew, or 5,000 s later."""
    monkeypatch.setattr(engine.video, "SHORT_FILE", 0)
    first, late = container("long-gop.ts"), tmp_path / "late.ts"
    ffmpeg("-i", first, "-c", "copy", "-output_ts_offset", 5000, late)
    for name, second in (("anew.ts", first), ("jump.ts", late)):
        (tmp_path / name).write_bytes(first.read_bytes() + second.read_bytes())
        whole, times = reference(tmp_path / name)
        assert len(whole) == 400 and times[-1] == pytest.approx(16, abs=0.2)
        start = times[300] + 0.001
        assert crc(decode_frames(tmp_path / name, 1, start, start + 0.01)[0]) == whole[300]


def test_packets_and_duration_are_those_of_the_video_stream():
    for name in ("b-frames.mp4", "open-gop.mkv", "long-gop.ts", "b-frames.avi", "wmv2.wmv"):
        assert count_packets(container(name)) == 200, name
        assert duration(container(name)) == pytest.approx(8, abs=0.1), name


def test_every_frame_gives_all_frames_in_order():
    whole, times = reference(container("b-frames.mp4"))
    found = list(every_frame(container("b-frames.mp4")))
    assert [crc(frame) for _, frame in found] == whole and [time for time, _ in found] == times
    assert next(every_frame(container("b-frames.mp4"), height=32))[1].shape == (32, 48, 3)


# ---- what a player shows


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Frames from 0 to 0.76 s, none until 8.8 s, frames until 9.56 s: in three containers."""
    folder = tmp_path_factory.mktemp("slides")
    still = f"{X264} -vf setpts='if(lt(N\\,20)\\,PTS\\,PTS+8/TB)' -fps_mode vfr -bf 0"
    return {
        name: make(folder / name, still, "testsrc2=size=96x64:rate=25:duration=1.6")
        for name in ("a.mp4", "a.mkv", "a.ts")
    }


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("short", [0, 2**30])
def test_a_window_without_a_new_frame_shows_the_one_on_screen(slides, name, short, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", short)
    whole, _ = reference(slides[name])
    assert [crc(frame) for frame in decode_frames(slides[name], 3, 2.0, 4.0)] == [whole[19]] * 3
    assert [crc(frame) for frame in decode_frames(slides[name], 3, 2.0, 8.86)] == [
        whole[n] for n in (19, 20, 21)
    ]
    assert "holds no frame from 60 s to 90 s" in message(decode_frames, slides[name], 3, 60.0, 90.0)


def test_the_last_picture_stays_while_the_sound_goes_on(tmp_path):
    path = tmp_path / "talk.mkv"
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=size=96x64:duration=2", "-f", "lavfi", "-i", "sine=duration=9", path
    )
    whole, _ = reference(path)
    assert crc(decode_frames(path, 1, 5.0, 7.0)[0]) == whole[-1]
    assert "holds no frame from 10 s" in message(decode_frames, path, 1, 10.0)


def boxes(content: bytes) -> list[bytes]:
    """The MP4 boxes one after another."""
    found = []
    while content:
        size = int.from_bytes(content[:4], "big")
        found, content = [*found, content[:size]], content[size:]
    return found


def test_an_attached_picture_is_not_the_video(tmp_path):
    """Also if it is stream 0, as in the files of some drones: the box with the cover comes first."""
    red = tmp_path / "red.jpg"
    Image.new("RGB", (96, 96), "red").save(red)
    path = make(tmp_path / "plain.mp4")
    cover, first = tmp_path / "cover.mp4", tmp_path / "first.mp4"
    ffmpeg("-i", path, "-i", red, *"-map 0 -map 1 -c copy -disposition:v:1 attached_pic".split(), cover)
    top = boxes(cover.read_bytes())
    moov = next(box for box in top if box[4:8] == b"moov")
    inner = sorted(boxes(moov[8:]), key=lambda box: box[4:8] != b"udta")
    first.write_bytes(b"".join(moov[:8] + b"".join(inner) if box is moov else box for box in top))
    assert "0:0[0x0]: Video: mjpeg" in ffmpeg("-i", first, "-f", "null", "-")
    for file in (cover, first):
        assert_exact(file)
        assert count_packets(file) == 200


@pytest.mark.parametrize(
    "name,options", [("a.m4a", "-c:a aac"), ("a.mp3", "-c:a libmp3lame"), ("a.flac", "")]
)
def test_a_sound_file_with_a_cover_is_no_video_whatever_its_name(tmp_path, name, options):
    Image.new("RGB", (96, 96), "red").save(tmp_path / "red.jpg")
    sound = ["-f", "lavfi", "-i", "sine=duration=1", "-i", tmp_path / "red.jpg", "-map", 0, "-map", 1]
    ffmpeg(*sound, "-c:v", "copy", "-disposition:v", "attached_pic", *options.split(), tmp_path / name)
    path = (tmp_path / name).rename(tmp_path / "song.mp4")
    for function in (count_packets, duration, lambda path: decode_frames(path, 3)):
        assert "song.mp4 holds no readable video" in message(function, path)


def test_the_default_stream_of_two_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "two.mkv"
    two = [
        "-f",
        "lavfi",
        "-i",
        "testsrc2=size=96x64:duration=2",
        "-f",
        "lavfi",
        "-i",
        "mandelbrot=size=64x64:end_scale=0.1",
    ]
    flags = "-map 0 -map 1 -t 2 -disposition:v:0 0 -disposition:v:1 default"
    ffmpeg(*two, *flags.split(), path)
    for short in (0, 2**30):
        monkeypatch.setattr(engine.video, "SHORT_FILE", short)
        assert {frame.shape for frame in decode_frames(path, 3)} == {(64, 64, 3)}
        assert {frame.shape for frame in decode_frames(path, 3, 0.5, 1.0)} == {(64, 64, 3)}
    ffmpeg("-i", path, *"-map 0 -c copy -disposition:v:0 default".split(), tmp_path / "both.mkv")
    assert decode_frames(tmp_path / "both.mkv", 1)[0].shape == (64, 96, 3)  # the first of two defaults


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """A browser call: the size of the frames changes every 10 frames. They have different shapes."""
    folder = tmp_path_factory.mktemp("call")
    for n, size in enumerate(("96x64", "64x80") * 3):
        make(
            folder / f"{n}.ts",
            f"{X264} -output_ts_offset {n * 0.4}",
            f"testsrc2=size={size}:rate=25:duration=0.4",
        )
    (folder / "call.ts").write_bytes(b"".join((folder / f"{n}.ts").read_bytes() for n in range(6)))
    ffmpeg("-i", folder / "call.ts", "-c", "copy", folder / "call.mkv")
    return folder


@pytest.mark.parametrize("name", ["call.ts", "call.mkv"])
@pytest.mark.parametrize("short", [0, 2**30])
def test_frames_keep_their_own_size_when_it_changes(call, name, short, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", short)
    assert_exact(call / name)
    assert [frame.shape[:2] for frame in decode_frames(call / name, 6)] == [(64, 96), (80, 64)] * 3


def test_frames_that_cannot_be_decoded_at_the_start_are_left_out(tmp_path, monkeypatch):
    """A VP8 recording that begins between two key frames, and one that has none in its first half."""
    whole = make(tmp_path / "whole.webm", "-c:v libvpx -g 25 -b:v 300k -cpu-used 8")
    for missing, path in ((10, tmp_path / "late.webm"), (1, tmp_path / "worse.mkv")):
        drop = f"noise=drop=lt(n\\,{missing})" if missing > 1 else "noise=drop=not(mod(n\\,25))*lt(n\\,150)"
        ffmpeg("-i", whole, "-c", "copy", "-copyinkf", "-bsf:v", drop, path)
    frames, _ = reference(tmp_path / "late.webm")
    assert len(frames) == 175
    for short in (0, 2**30):
        monkeypatch.setattr(engine.video, "SHORT_FILE", short)
        found = [crc(frame) for frame in decode_frames(tmp_path / "late.webm", 5)]
        assert found == [frames[n] for n in segment_midpoints(175, 5)]
        assert "damaged, the first" in message(decode_frames, tmp_path / "worse.mkv", 5)


def test_pixels_are_the_stored_ones_not_stretched_and_not_tone_mapped(tmp_path):
    """Anamorphic: 96 x 64 to be shown as 192 x 64. HDR: the same numbers, whatever the transfer curve."""
    wide = make(tmp_path / "wide.mp4", f"{X264} -vf setsar=2")
    assert decode_frames(wide, 1)[0].shape == (64, 96, 3)
    plain = make(tmp_path / "sdr.mp4")
    hdr = tmp_path / "hdr.mp4"
    ffmpeg("-i", plain, "-c", "copy", "-bsf:v", "h264_metadata=transfer_characteristics=16", hdr)
    assert "smpte2084" in ffmpeg("-i", hdr, "-f", "null", "-")
    assert [crc(f) for f in decode_frames(hdr, 3)] == [crc(f) for f in decode_frames(plain, 3)]


@pytest.mark.parametrize("short", [0, 2**30])
def test_resizing_at_once_gives_the_same_pixels(short, monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", short)
    path = container("b-frames.mp4")
    for window in ((0.0, None), (3.0, 4.0)):
        full = decode_frames(path, 5, *window)
        assert all(map(np.array_equal, decode_frames(path, 5, *window, 48), [resize(f, 48) for f in full]))


def test_many_frames_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(engine.video, "SHORT_FILE", 0)
    whole, _ = reference(container("b-frames.mp4"))
    found = decode_frames(container("b-frames.mp4"), 3000)
    assert [crc(frame) for frame in found] == [whole[n] for n in segment_midpoints(200, 3000)]
    assert len({id(frame) for frame in found}) == 200


# ---- real files


@pytest.mark.slow
def test_real_clips_are_exact_to_the_frame(realdata):
    paths = sorted((realdata / "clips").iterdir())
    assert len(paths) == 26
    for path in paths:
        assert_exact(path, windows=path.stem in ("playing_guitar", "flipping_a_pancake", "mmaction_test"))


def test_broken_files_are_errors_and_odd_files_are_not(realdata):
    broken = {
        "audio_only.mp3": "holds no readable video",
        "corrupted.mp4": "damaged",
        "not_a_video.mp4": "holds no readable video",
        "truncated_faststart_half.mp4": "truncated",
        "zero_bytes.webm": "holds no readable video",
    }
    for path in sorted((realdata / "nasty").iterdir()):
        if path.name in broken:
            text = message(decode_frames, path, 12)
            assert broken[path.name] in text and path.name in text and text.count("\n") == 0
        else:
            assert_exact(path, windows=0)
