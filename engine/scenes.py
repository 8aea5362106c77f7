"""How a video file is cut into clips: whole, into windows of equal length, or into scenes."""

from pathlib import Path

from engine.files import DataError
from engine.video import duration, every_frame

MOST = 100_000  # clips of one file
HEIGHT = 144  # pixels of the frames on which scenes are detected


def spans(path: Path, cut: str) -> list[tuple[float, float | None]]:
    """The clips of a file as (start, end) in seconds. cut: whole, scenes, or "window S" (about S seconds).

    Raises DataError for a broken file, and for more than MOST clips."""
    if cut == "whole":
        return [(0.0, None)]
    if cut == "scenes":
        edges = scene_starts(path)
    else:
        window = float(cut.split()[1])
        count = max(1, round(duration(path) / window))  # the last window is 0.5 to 1.5 times as long
        if count > MOST:
            raise DataError(f"{path} has {count} windows of {window:g} s: use a larger --window.")
        edges = [n * window for n in range(count)]
    return list(zip(edges, [*edges[1:], None]))


def scene_starts(path: Path) -> list[float]:
    """The times in seconds at which scenes begin; the first is 0. Raises DataError.

    scenedetect finds the cuts, on the frames that ffmpeg decodes. Its own readers see an interlaced video
    black, and take a name with a colon for an address. A frame of another shape begins a scene too."""
    try:
        from scenedetect import ContentDetector, FrameTimecode
    except ImportError:
        raise DataError("--scenes needs scenedetect: pip install -r requirements-search.txt.") from None
    times, cuts, shape, detector = [], [], None, None  # cuts: numbers of frames
    for number, (time, frame) in enumerate(every_frame(path, HEIGHT)):
        if frame.shape != shape:
            cuts, shape, detector = [*cuts, number], frame.shape, ContentDetector()
        now = FrameTimecode(
            number, 25.0
        )  # any rate: scenedetect counts frames, of which a scene has 15 or more
        cuts += [cut.frame_num for cut in detector.process_frame(now, frame[..., ::-1])]  # in BGR
        times.append(time)
    if not times:
        raise DataError(f"{path} holds no frame: replace it or delete its rows.")
    cuts += [cut.frame_num for cut in detector.post_process(now)]
    return sorted({times[number] if number else 0.0 for number in cuts})
