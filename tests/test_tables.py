"""Rows of CSV and JSONL files: what is not clear is refused with its row, and never guessed."""

import json
import math
from unittest import mock

import pytest
from conftest import message

from engine.tables import Row, like_name, read_json, read_lines, read_objects, read_own_rows, read_rows


@pytest.fixture
def own(tmp_path):
    """Writes a file of annotations and returns its path."""

    def write(content: str, name: str = "a.csv"):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        return tmp_path / name

    return write


def read(path) -> list[tuple]:
    return [(row.name, *row.captions) for row in read_own_rows(path)]


# ---- CSV: commas and quotation marks


@pytest.mark.parametrize(
    "rows,says",
    [
        ("v1.mp4,a man walks, then sits, and reads\n", "row 2: 4 fields for 2 columns; put quotation marks"),
        ("v1.mp4,a cat\nv2.mp4,one, two\n", "row 3: 3 fields for 2 columns"),
        ('v1.mp4,the "best" one, two\n', "row 2: 3 fields"),
    ],
)
def test_a_text_with_commas_and_no_quotation_marks_is_named(own, rows, says):
    assert f"a.csv, {says}" in message(read, own(f"video,caption\n{rows}"))


def test_columns_in_another_order_or_with_a_split_change_nothing(own):
    said = message(read, own("caption,split,video\none, two,train,v1.mp4\n"))
    assert "row 2: 4 fields for 3 columns" in said
    said = message(read, own("video,caption,split\nv1.mp4,a,\nv2.mp4,a man, then sits\n"))
    assert 'row 3: the split of v2.mp4 is "then sits"' in said


def test_empty_fields_behind_the_columns_do_not_count(own):
    assert read(own("video,caption,,\nv1.mp4,a,,\nv2.mp4,b,,,,\n")) == [("v1.mp4", "a"), ("v2.mp4", "b")]


@pytest.mark.parametrize(
    "rows,row",
    [
        ('v1.mp4,"hello there\nv2.mp4,a cat\nv3.mp4,a car\n', 2),  # never closed
        ('v1.mp4,a\nv2.mp4,"hello there', 3),
        ('v1.mp4,"hello" there\n', 2),  # closed too early
        ('v1.mp4,"hello\nv2.mp4,"a cat"\n', 2),
        ('"v1.mp4,hello\nv2.mp4,a cat\n', 2),
        (f'v1.mp4,a\n\nv2.mp4,"{"hello " * 30_000}\n', 4),  # longer than a field may be
    ],
)
def test_a_quotation_mark_that_is_not_closed_is_named(own, rows, row):
    said = message(read, own(f"video,caption\n{rows}"))
    assert f"a.csv, row {row}: a quotation mark is not closed" in said and "\n" not in said


@pytest.mark.parametrize(
    "content,line",
    [
        ('video,caption\nv1.mp4,"hello\nv2.mp4,a cat"\nv3.mp4,a car\n', "v2.mp4,a cat"),
        ('video,caption\r\nv1.mp4,"hello\r\nv2.mp4,a cat\r\nv3.mp4,b"\r\n', "v2.mp4,a cat"),
        ('video,caption\nclip1,"hello\nclip2,a cat"\n', "clip2,a cat"),  # names without a suffix
        ('video,caption,split\nv1.mp4,"hello,train\nv2.mp4,a cat",train\n', "v2.mp4,a cat"),
        ('split,video,caption\ntrain,v1.mp4,"hello\ntrain,v2.mp4,a cat"\n', "train,v2.mp4,a cat"),
        ('caption,video\n"hello,v1.mp4\na cat",v2.mp4\n', "hello,v1.mp4"),
        ('"video","caption"\n"v1.mp4","hello\n v2.mp4 ,a cat"\n', " v2.mp4 ,a cat"),
    ],
)
def test_two_stray_quotation_marks_do_not_swallow_the_rows_between_them(own, content, line):
    assert f"a.csv, row 2: one text holds another row, {line!r}" in message(read, own(content))


def test_rows_are_found_in_a_text_by_the_videos_that_exist_or_by_many_columns(own):
    path = own('video,caption\ncat,"a cat\ndog,a dog"\n')
    assert read(path) == [("cat", "a cat\ndog,a dog")]
    assert "row 2: one text holds another row, 'dog,a dog'" in message(
        read_own_rows, path, {"dog"}.__contains__
    )
    path = own('id,a,b,script\nx,1,2,"A man\ny,1,2,sits"\n')
    assert "row 2: one text holds another row, 'y,1,2,sits'" in message(read_rows, path, "id", "script")


def test_a_caption_of_several_lines_is_one_caption(own):
    path = own(
        'video,caption\nv1.mp4,"A man sits,\nthen he stands, and goes"\n\nv2.mp4,"At 0:10, a ""cat"""\n'
    )
    assert read(path) == [
        ("v1.mp4", "A man sits,\nthen he stands, and goes"),
        ("v2.mp4", 'At 0:10, a "cat"'),
    ]


def test_a_row_has_the_number_that_a_spreadsheet_shows(own):
    assert "a.csv, row 5: the caption is empty" in message(
        read, own('video,caption\n\nv1.mp4,"one\ntwo"\n\nv2.mp4,\n')
    )
    assert "a.jsonl, row 3: the caption is empty" in message(
        read, own('{"video": "v", "caption": "a"}\n\n{"video": "v"}\n', "a.jsonl")
    )


def test_blanks_around_a_field_do_not_count(own):
    content = 'video , caption,split\n v1.mp4 , a cat , train \n"v2.mp4" , "a, ""b""" ,val\t\nv3.mp4, c,\n'
    one, two, three = read_own_rows(own(content))
    assert (one.name, one.captions, one.split) == ("v1.mp4", ["a cat"], "train")
    assert (two.name, two.captions, two.split) == ("v2.mp4", ['a, "b"'], "val")
    assert (three.name, three.captions, three.split) == ("v3.mp4", ["c"], "")


def test_a_column_that_is_there_twice_or_not_at_all_is_named(own):
    assert "has the column caption twice" in message(read, own("video,caption,caption\nv1.mp4,a,b\n"))
    assert "found: Video;Caption." in message(read, own("Video;Caption\nv1.mp4;a\n"))
    assert "then rows; found: video, caption." in message(read, own("video,caption\n"))
    assert len(message(read, own(f"{'x' * 9999}\na\n"))) < 500


def test_what_a_program_wrote_for_a_list_or_for_nothing_is_no_caption(own):
    for caption in ("nan", "NaN", "None", "null", "<NA>", "\"['a man', 'a dog']\"", '"[""a man""]"'):
        said = message(read, own(f"video,caption\nv1.mp4,{caption}\n"))
        assert "row 2: the caption is the text" in said and "its own row" in said
    assert read(own("video,caption\nv1.mp4,[laughs] my nan [cries]\n")) == [
        ("v1.mp4", "[laughs] my nan [cries]")
    ]


# ---- JSONL


def line(**cells) -> str:
    return json.dumps({"video": "v1.mp4", "caption": "a"} | cells)


def test_a_list_is_several_captions(own):
    lines = [
        line(caption=["a man walks ", "someone walks"]),
        line(caption=["one"]),
        line(caption="two, three"),
    ]
    assert read(own("\n".join(lines), "A.JSONL")) == [
        ("v1.mp4", "a man walks", "someone walks"),
        ("v1.mp4", "one"),
        ("v1.mp4", "two, three"),
    ]


@pytest.mark.parametrize(
    "caption,says",
    [
        (None, "is empty"),
        ("", "is empty"),
        ([], "is empty"),
        (["a", " "], "is empty"),
        (["a", None], "is empty"),
        (math.nan, "is NaN, which is no text"),
        (["a", math.nan], "is NaN, which is no text"),
        (12, "is 12, which is no text"),
        (0, "is 0, which is no text"),
        (False, "is false, which is no text"),
        ({"en": "a"}, 'is {"en": "a"}, which is no text'),
        ([["a"]], 'is ["a"], which is no text'),
        ("['a', 'b']", "is the text \"['a', 'b']\""),
        ("nan", 'is the text "nan"'),
        ("a\0b", r'"a\u0000b" holds'),
        ("a\ud800b", r'"a\ud800b" holds'),
    ],
)
def test_what_is_no_caption_is_named(own, caption, says):
    said = message(read, own(f"{line()}\n{line(caption=caption)}\n", "a.jsonl"))
    assert f"a.jsonl, row 2: the caption {says}" in said
    assert said.isprintable()


@pytest.mark.parametrize(
    "video", [None, "", " ", 12, ["v1.mp4"], "a\0.mp4", "a\udcff.mp4", "x" * 256, "a/" + "é" * 128]
)
def test_what_is_no_name_is_named(own, video):
    said = message(read, own(line(video=video), "a.jsonl"))
    assert "a.jsonl, row 1: the video " in said and said.isprintable()


@pytest.mark.parametrize("split", ["dev", 1, math.nan, ["train"], True, {}])
def test_what_is_no_split_is_named(own, split):
    said = message(read, own(line(split=split), "a.jsonl"))
    assert "row 1: the split of v1.mp4 is" in said and "must be train, val or test" in said


@pytest.mark.parametrize("key", ["start", "end"])
@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", '"inf"', "true", "[1]", "1" + "0" * 400]
)
def test_what_is_no_time_is_named(own, key, value):
    content = f'{{"video": "v1.mp4", "caption": "a", "{key}": {value}}}'
    assert "row 1: start and end are seconds, not " in message(read, own(content, "a.jsonl"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "one", "0x1"])
def test_what_is_no_time_is_named_in_csv_too(own, value):
    content = f"video,caption,start,end\nv1.mp4,a,0,{value}\n"
    assert f'row 2: start and end are seconds, not "{value}"' in message(read, own(content))


def test_times_are_numbers_or_texts_or_empty(own):
    lines = [line(start=1, end=2.5), line(start="1", end=" 2.5 "), line(start=None, end=""), line(start=-0.0)]
    rows = read_own_rows(own("\n".join(lines), "a.jsonl"))
    assert [(row.start, row.end) for row in rows] == [(1, 2.5), (1, 2.5), (0, None), (0, None)]
    assert [row.id for row in rows[1:]] == ["v1.mp4 [1-2.5]", "v1.mp4", "v1.mp4"]


def test_windows_that_differ_have_ids_that_differ():
    row = Row("", "v", [], "", 10000.25, None)
    assert row.id == "v [10000.25-]" and Row("", "v", [], "", 0.1, 1e6).id == "v [0.1-1e+06]"


@pytest.mark.parametrize(
    "content,says",
    [
        ('{"video": "v1.mp4", "caption": "a"', "Expecting ',' delimiter"),
        (line() + "\n" + "[" * 100_000, "maximum recursion depth"),
        ('{"video": "v1.mp4", "caption": ' + "[" * 100_000, "maximum recursion depth"),
        (f"[{line()}]", "no object"),
        ("video,caption", "Expecting value"),
        ('{"video": "v", "caption": "a", "caption": "b"}', "a key is there twice"),
        ('{"video": "v", "caption": "a", "end": ' + "1" * 5000 + "}", "Exceeds the limit"),
    ],
)
def test_a_line_that_is_no_object_is_named(own, content, says):
    said = message(read, own(content, "a.jsonl"))
    assert f"row {content.count(chr(10)) + 1} is not JSONL ({says}" in said and "\n" not in said


def test_a_list_that_is_too_deep_to_be_printed_is_named(own, monkeypatch):
    """Python reads a list that is nested about 900 times, but cannot always write it."""
    content = f'{{"video": "v", "caption": {"[" * 700}{"]" * 700}}}'
    path = own(content, "a.jsonl")
    assert "the caption is [[[" in message(read, path)
    monkeypatch.setattr(json, "dumps", mock.Mock(side_effect=RecursionError))
    assert "the caption is a deeply nested list, which is no text" in message(read, path)


def test_a_column_in_capitals_is_not_left_out(own):
    assert "has 'Split' for 'split'" in message(read, own("video,caption,Split\nv1.mp4,a,train\n"))
    assert "has 'START' for 'start'" in message(read, own(line(START=1), "a.jsonl"))


def test_a_file_without_rows_is_named(own):
    assert "a.jsonl is empty" in message(read, own("\n \n", "a.jsonl"))


# ---- all kinds


def test_json_that_is_nested_too_deeply_or_incomplete_is_named(own):
    for content in ("[" * 100_000, '{"a": ["b"', "1" * 5000):
        assert "a.json is not a complete JSON file (" in message(read_json, own(content, "a.json"))


@pytest.mark.parametrize("reader", [read_lines, read_json, read_own_rows, read_objects])
def test_a_file_that_cannot_be_read_is_named(tmp_path, reader):
    assert "cannot be read (Is a directory)" in message(reader, tmp_path)
    (tmp_path / "a.csv").write_text("video,caption\n", encoding="utf-16")
    assert "cannot be read as UTF-8" in message(reader, tmp_path / "a.csv")


def test_names_of_videos_are_told_from_words():
    for name in ("v1", "a b.mp4", "x.JPG", "05124a", "-4wsuPCjDBc_5_15", "c/d.webm"):
        assert like_name(name), name
    for word in ("then", "he goes", "0:10", "At 1", "", "12", "etc.", "a/b"):
        assert not like_name(word), word
