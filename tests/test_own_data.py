"""Your own data: a CSV or JSONL file and a folder of videos."""

import json
import re
import time
from collections import Counter

import pytest
from conftest import message

from engine.datasets import SPLITS, Files, Row, _gather, of_split, read_clips, read_csv
from engine.files import DataError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def sizes(clips) -> dict[str, int]:
    """The number of clips of each split."""
    return Counter(clip.split for clip in clips)


@pytest.fixture
def read(clips_folder, tmp_path):
    """Reads the content of an annotation file of the built-in clips."""
    return lambda rows, name="a.csv": read_csv(write(tmp_path / name, rows), clips_folder / "clips")


def test_csv_gathers_the_captions_of_a_video(read, clips_folder):
    rows = 'video,caption,split\nclip00001.mp4,"a, b",train\nclip00002.mp4,c,test\nclip00001.mp4,d,train\n'
    one, two = read("\ufeff" + rows.replace("\n", "\r\n"))
    assert (one.id, one.captions, one.split, two.split) == ("clip00001.mp4", ("a, b", "d"), "train", "test")
    assert one.path == clips_folder / "clips" / "clip00001.mp4"


def test_csv_names_may_lack_their_suffix(read):
    (clip,) = read("video,caption,split\nclip00001,c,train\n")
    assert clip.path.name == "clip00001.mp4" and clip.id == "clip00001"


def test_csv_without_splits_is_divided_by_the_names_alone(read):
    names = [f"clip{k:05d}.mp4" for k in range(24)]
    forth, back = (
        read("video,caption\n" + "".join(f"{n},c\n" for n in order)) for order in (names, names[::-1])
    )
    assert sorted(forth, key=str) == sorted(back, key=str)
    assert sizes(forth) == {"train": 20, "val": 2, "test": 2}


@pytest.mark.parametrize(
    "rows,says",
    [
        ("clip,text\na,b\n", "needs the columns video,caption.*found: clip, text"),
        ("", "found: nothing"),
        ("video,caption,split\nclip00001.mp4,,train\n", "row 2: the caption is empty"),
        ("video,caption,split\na.mp4,a,train\na.mp4,b,test\n", "row 3: a.mp4 is in two splits"),
        ("video,caption,split\nclip00001.mp4,a,dev\n", "must be train, val or test"),
        ("video,caption,start,end\nclip00001.mp4,a,one,\n", "start and end are seconds"),
        ("video,caption,start,end\nclip00001.mp4,a,2,1\n", "end must be later than start"),
        ("video,caption,start,end\nclip00001.mp4,a,0,0\n", "end must be later than start"),
        ("video,caption,start,end\nclip00001.mp4,a,-1,\n", "end must be later than start"),
    ],
)
def test_csv_mistakes_are_named(read, rows, says):
    with pytest.raises(DataError, match=says):
        read(rows)


def test_missing_files_and_foreign_encodings_are_named(clips_folder, tmp_path):
    assert "gone.csv not found" in message(read_csv, tmp_path / "gone.csv", clips_folder / "clips")
    assert "is not a folder" in message(read_csv, clips_folder / "clips.csv", tmp_path / "gone")
    (tmp_path / "latin.csv").write_bytes("video,caption\na,caf\xe9\n".encode("latin-1"))
    assert "UTF-8" in message(read_csv, tmp_path / "latin.csv", clips_folder / "clips")


def test_an_empty_split_and_an_unknown_data_set_are_named(clips, tmp_path):
    assert "no clip has split 'val'" in message(of_split, [c for c in clips if c.split != "val"], "val")
    assert "choose one of shapes, shapes-second, shapes-scenes, csv, msrvtt" in message(
        read_clips, "imagenet", tmp_path
    )
    assert "--annotations FILE" in message(read_clips, "csv", tmp_path)


def test_real_captions_file_is_read_whole(realdata):
    clips = read_csv(realdata / "captions.csv", realdata / "clips")
    assert len(clips) == 26 and {*sizes(clips)} == {*SPLITS}


def test_each_window_of_a_video_is_a_clip(read):
    rows = ("a,train,0,1.5", "b,train,1.5,", "c,train,0,1.5")
    one, two = read("video,caption,split,start,end\n" + "".join(f"clip00001.mp4,{row}\n" for row in rows))
    assert (one.captions, one.start, one.end) == (("a", "c"), 0.0, 1.5)
    assert (two.captions, two.start, two.end) == (("b",), 1.5, None)
    assert (one.id, two.id) == ("clip00001.mp4 [0-1.5]", "clip00001.mp4 [1.5-]")


def test_csv_windows_of_one_video_stay_in_one_split(read):
    windows = "".join(f"clip{k:05d}.mp4,c,{s},{s + 1}\n" for k in range(20) for s in range(3))
    splits: dict = {}
    for clip in read("video,caption,start,end\n" + windows):
        splits.setdefault(clip.path, set()).add(clip.split)
    assert len(splits) == 20 and all(len(split) == 1 for split in splits.values())
    assert Counter(split for (split,) in splits.values()) == {"train": 16, "val": 2, "test": 2}


def test_jsonl_is_csv_with_an_object_a_line(read):
    lines = [
        {"video": "clip00001.mp4", "caption": 'a "b", c', "split": "train"},
        {"video": "clip00002.mp4", "caption": "d", "split": "val", "end": 1},
    ]
    one, two = read("\n".join(map(json.dumps, lines)), "a.jsonl")
    assert (one.captions, one.split, two.end) == (('a "b", c',), "train", 1.0)
    assert "is not JSONL" in message(read, "video,caption\n", "b.jsonl")


@pytest.fixture
def links(tmp_path):
    """a.mp4 under many names, b.mp4, c.jpg, and a link to nothing. Reads the rows of a CSV file on them."""
    folder = tmp_path / "videos"
    for name in ("a.mp4", "b.mp4", "sub/c.jpg"):
        write(folder / name, "a video")
    (folder / "link.mp4").symlink_to("a.mp4")
    (folder / "hard.mp4").hardlink_to(folder / "a.mp4")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "gone.mp4").symlink_to("nothing.mp4")
    columns = "video,caption,split,start,end"
    return lambda *rows: read_csv(write(tmp_path / "a.csv", "\n".join([columns, *rows])), folder)


NAMES = ["./a.mp4", "a", " a.mp4 ", "a.avi", "link.mp4", "link", "hard.mp4", "sub/../a.mp4", "sub/up/a.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_one_clip_under_all_its_names_and_in_one_split(links, name):
    (clip,) = links("a.mp4,one,train,,", f"{name},two,train,,")
    assert (clip.id, clip.path.name, clip.captions) == ("a.mp4", "a.mp4", ("one", "two"))
    said = message(links, "a.mp4,one,train,,", "b.mp4,x,val,,", f"{name},two,test,,")
    assert re.search(r"a\.csv, row 4: .* is in two splits(, also as a\.mp4)?; put all its rows in one", said)
    splits = {clip.split for clip in links("a.mp4,one,,0,1", f"{name},two,,1,2", "b.mp4,x,,,")[:2]}
    assert len(splits) == 1  # without splits: the hash of one name


def test_a_missing_file_is_one_clip_too(links):
    assert len(links("x/gone.mp4,one,train,,", "./x/gone.mp4,two,train,,")) == 1
    assert "row 3: ./d.mp4 is in two splits" in message(links, "d.mp4,one,train,,", "./d.mp4,two,val,,")
    assert [clip.path.name for clip in links("gone,one,train,,", "nothing.mp4,two,val,,")] == [
        "gone.mp4",
        "nothing.mp4",
    ]


def test_two_splits_do_not_share_seconds_of_a_file(links):
    assert len(links("a,one,train,0,5", "link,two,test,5,9", "hard,three,val,9,", "a,four,train,0,4")) == 4
    for rows in (
        ("a,one,train,0,5", "link,two,test,4.5,9"),
        ("a,one,train,,", "a,two,test,4,9"),
        ("a,one,test,3,4", "a,x,train,0,1", "a,two,train,2,"),
        ("a,one,train,0,9", "a,x,train,1,2", "a,two,test,8,9"),
    ):
        assert "are parts of one video that overlap; put them in one split" in message(links, *rows)


def test_a_window_of_a_picture_is_refused(links):
    assert links("sub/c.jpg,one,train,,", "c,two,train,,")[0].captions == ("one", "two")
    assert "row 2: c is a picture, so leave start and end empty" in message(links, "c,one,train,1,2")


def test_windows_that_differ_by_little_are_two_clips(links):
    one, two = links("a,one,train,10000.25,10001", "a,two,train,10000.26,10001")
    assert one.id != two.id and (one.captions, two.captions) == (("one",), ("two",))


def test_many_captions_of_one_video_take_linear_time(clips_folder):
    row, started = Row("row 2", "clip00001.mp4", ["a"], "train", 0.0, None), time.process_time()
    (clip,) = _gather([row] * 100_000, Files(clips_folder / "clips"))
    assert len(clip.captions) == 100_000 and time.process_time() - started < 5


def test_missing_videos_of_a_csv_are_listed(read, clips_folder):
    """Training leaves them out; evaluation refuses them."""
    (clip,) = read("video,caption,split\ngone.mp4,a,train\n")
    assert clip.path == clips_folder / "clips" / "gone.mp4"
