"""Readers: every trap of the data sets' annotation files has a test named after it, on small files in the true format."""

import json
import pickle
from collections import Counter

import pytest
from conftest import message

import data
from data import read_clips, read_csv, stem


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def touch(*paths):
    for path in paths:
        write(path, "a video")


def by_id(clips) -> dict:
    assert len({clip.id for clip in clips}) == len(clips)
    return {clip.id: clip for clip in clips}


# -------------------------------------------------------------------------------------------------------------------- finding files


@pytest.mark.parametrize(
    "name,base",
    [
        ("video0.mp4", "video0"),
        ("3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675.avi", "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675"),
        ("3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675", "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675"),
        ("65430553@N08_7624593376_420700bd90.", "65430553@N08_7624593376_420700bd90"),
        ("65430553@N08_7624593376_420700bd90..mp4", "65430553@N08_7624593376_420700bd90"),
        ("-4wsuPCjDBc_5_15.AVI", "-4wsuPCjDBc_5_15"),
        ("150E6.mp4", "150E6"),
    ],
)
def test_a_stem_keeps_the_dots_of_a_name(name, base):
    assert stem(name) == base


def test_videos_are_found_anywhere_below_the_folder_and_under_another_ending(tmp_path):
    touch(
        tmp_path / "deep" / "er" / "a.mp4", tmp_path / "b.mov", tmp_path / "x" / "c.mp4", tmp_path / "y" / "c.mp4", tmp_path / "__MACOSX" / "._a.mp4"
    )
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    files = data.Files(tmp_path)
    assert files.video("a.mp4") == tmp_path / "deep" / "er" / "a.mp4" and files.video("b.avi") == tmp_path / "b.mov"
    assert files.video("y/c.mp4") == tmp_path / "y" / "c.mp4" and files.video("gone.mp4") == tmp_path / "gone.mp4"
    assert "keep one of them" in message(files.video, "c.mp4")


# --------------------------------------------------------------------------------------------------------------------------- MSR-VTT


@pytest.fixture
def msrvtt(tmp_path):
    """Ten clips: 0-5 train (4 and 5 are officially validation), 6-9 test; 1k-A tests 6 and 7."""
    videos = [
        {"video_id": f"video{k}", "split": "train" if k < 4 else "validate" if k < 6 else "test", "start time": 1.5, "id": k} for k in range(10)
    ]
    sentences = [
        {"caption": f"caption {n}  of {k}", "video_id": f"video{k}", "sen_id": 10 * n + k} for n in range(3) for k in (3, 0, 1, 2, 9, 8, 7, 6, 5, 4)
    ]
    folder = tmp_path / "msrvtt"
    write(folder / "MSRVTT_data.json", json.dumps({"info": {}, "videos": videos, "sentences": sentences}))
    write(folder / "lists" / "MSRVTT_train.9k.csv", "video_id\n" + "".join(f"video{k}\n" for k in range(6)))
    write(folder / "lists" / "MSRVTT_train.7k.csv", "video_id\nvideo0\nvideo1\nvideo5")  # no last line end
    rows = [f"ret{n},msr{k},video{k},a man playing video games" for n, k in enumerate((6, 7))]
    write(folder / "lists" / "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\n" + "\n".join(rows) + "\n")
    touch(*(folder / "videos" / "all" / f"video{k}.mp4" for k in range(10)))
    return tmp_path


def test_msrvtt_sentences_in_any_order_are_gathered_by_their_video(msrvtt):
    clips = by_id(read_clips("msrvtt", msrvtt))
    assert clips["video2"].captions == ("caption 0  of 2", "caption 1  of 2", "caption 2  of 2")
    assert clips["video2"].path == msrvtt / "msrvtt" / "videos" / "all" / "video2.mp4"


def test_msrvtt_9k_trains_without_the_official_validation_clips(msrvtt):
    clips = read_clips("msrvtt", msrvtt)
    assert Counter(clip.split for clip in clips) == {"train": 4, "val": 2, "test": 2}
    assert {clip.id for clip in clips if clip.split == "val"} == {"video4", "video5"}


def test_msrvtt_test_ids_are_the_third_column_and_equal_sentences_stay_apart(msrvtt):
    test = [clip for clip in read_clips("msrvtt", msrvtt) if clip.split == "test"]
    assert [(clip.id, clip.captions) for clip in test] == [(f"video{k}", ("a man playing video games",)) for k in (6, 7)]


def test_msrvtt_7k_list_without_a_last_line_end_is_read_whole(msrvtt):
    clips = by_id(read_clips("msrvtt-7k", msrvtt))
    assert {name: clip.split for name, clip in clips.items()} == {
        "video0": "train",
        "video1": "train",
        "video5": "val",
        "video6": "test",
        "video7": "test",
    }


def test_msrvtt_full_takes_the_official_splits_and_every_caption(msrvtt):
    clips = read_clips("msrvtt-full", msrvtt)
    assert Counter(clip.split for clip in clips) == {"train": 4, "val": 2, "test": 4} and all(len(clip.captions) == 3 for clip in clips)


def test_msrvtt_without_official_splits_validates_on_a_cut_that_is_always_the_same(msrvtt):
    path = msrvtt / "msrvtt" / "MSRVTT_data.json"
    content = json.loads(path.read_text())
    write(path, json.dumps({"sentences": content["sentences"]}))
    one, two = ({clip.id for clip in read_clips("msrvtt", msrvtt) if clip.split == "val"} for _ in range(2))
    assert one == two and len(one) == 1
    assert "give video" in message(read_clips, "msrvtt-full", msrvtt) and "no split" in message(read_clips, "msrvtt-full", msrvtt)


def test_real_msrvtt_files_are_read_whole(realdata):
    folder = realdata / "annotations" / "msrvtt"
    (renamed := folder / "MSRVTT_data.rebuilt_1cap.json")
    with pytest.MonkeyPatch.context() as patch:  # the real lists, with a JSON of the true structure under another name
        patch.setattr(data.Files, "annotation", lambda self, name: renamed if name == "MSRVTT_data.json" else folder / name)
        nine, seven = ([clip for clip in read_clips(name, folder, folder)] for name in ("msrvtt", "msrvtt-7k"))
    assert Counter(clip.split for clip in nine) == {"train": 8100, "val": 900, "test": 1000}
    assert Counter(clip.split for clip in seven) == {"train": 6309, "val": 701, "test": 1000}
    assert next(clip for clip in nine if clip.id == "video9770").captions == ("a person is connecting something to system",)


# ----------------------------------------------------------------------------------------------------------------------------- LSMDC


TIMES = "00.03.07.170\t00.03.09.675\t00.03.07.170\t00.03.09.675"
LONG = "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675"


@pytest.fixture
def lsmdc(tmp_path):
    folder = tmp_path / "lsmdc"
    lines = [f"{LONG}\t{TIMES}\tSOMEONE runs, and falls.", f"0001_American_Beauty_00.00.51.926-00.00.54.129\t{TIMES}\tHer mind wanders for a beat.",
             f"{LONG}\t{TIMES}\tA second sentence."]  # fmt: skip
    write(folder / "LSMDC16_annos_training.csv", "\r\n".join(lines) + "\r\n")
    write(folder / "LSMDC16_annos_val.csv", f'"1001_Flight_00.00.01.000-00.00.03.000\t{TIMES}\tSOMEONE says ""stop"", and leaves."\n')
    write(folder / "LSMDC16_challenge_1000_publictect.csv", f'"1002_Up_00.00.01.000-00.00.03.000\t{TIMES}\tA house flies.\n')
    touch(folder / "clips" / "3009_BATTLE_LOS_ANGELES" / f"{LONG}.avi")
    return tmp_path


def test_lsmdc_files_are_tab_separated_without_header_whatever_their_name(lsmdc):
    clips = by_id(read_clips("lsmdc", lsmdc))
    assert Counter(clip.split for clip in clips.values()) == {"train": 2, "val": 1, "test": 1}
    assert clips["0001_American_Beauty_00.00.51.926-00.00.54.129"].captions == ("Her mind wanders for a beat.",)


def test_lsmdc_repeated_clip_ids_keep_every_caption(lsmdc):
    assert by_id(read_clips("lsmdc", lsmdc))[LONG].captions == ("SOMEONE runs, and falls.", "A second sentence.")


def test_lsmdc_ids_with_many_dots_name_their_movies_folder(lsmdc):
    clips = by_id(read_clips("lsmdc", lsmdc))
    assert clips[LONG].path == lsmdc / "lsmdc" / "clips" / "3009_BATTLE_LOS_ANGELES" / f"{LONG}.avi"
    missing = clips["0001_American_Beauty_00.00.51.926-00.00.54.129"].path
    assert missing == lsmdc / "lsmdc" / "0001_American_Beauty" / "0001_American_Beauty_00.00.51.926-00.00.54.129.avi"


def test_lsmdc_stray_quotes_are_taken_off(lsmdc):
    clips = by_id(read_clips("lsmdc", lsmdc))
    assert clips["1001_Flight_00.00.01.000-00.00.03.000"].captions == ('SOMEONE says "stop", and leaves.',)
    assert clips["1002_Up_00.00.01.000-00.00.03.000"].captions == ("A house flies.",)


def test_lsmdc_a_line_of_other_fields_is_named(lsmdc):
    write(lsmdc / "lsmdc" / "LSMDC16_annos_val.csv", f"a\t{TIMES}\tfine\nb,c,d\n")
    assert "LSMDC16_annos_val.csv, line 2: 1 tab-separated fields" in message(read_clips, "lsmdc", lsmdc)


def test_lsmdc_an_empty_sentence_is_named(lsmdc):
    write(lsmdc / "lsmdc" / "LSMDC16_annos_val.csv", f"1001_Flight_00.00.01.000-00.00.03.000\t{TIMES}\t\n")
    assert "no caption for 1001_Flight" in message(read_clips, "lsmdc", lsmdc)


# ---------------------------------------------------------------------------------------------------------------------------- DiDeMo


def didemo_item(video: str, text: str) -> dict:
    return {"num_segments": 6, "description": text, "dl_link": "https://", "times": [[4, 4]] * 4, "video": video, "annotation_id": 1}


@pytest.fixture
def didemo(tmp_path):
    folder = tmp_path / "didemo"
    bare = "65430553@N08_7624593376_420700bd90."
    items = [didemo_item("12@N0_1_a.m4v", "first. "), didemo_item(bare, "someone kicks"), didemo_item("12@N0_1_a.m4v", "second")]
    for split, extra in {"train": "t.mov", "val": "v.wmv", "test": "not retrieved.3gp"}.items():
        own = [{**item, "video": f"{split}_{item['video']}"} for item in items] + [didemo_item(extra, "one")]
        write(folder / f"{split}_data.json", json.dumps(own))
        write(folder / f"{split}_list.txt", f"{split}_{bare}\n{split}_12@N0_1_a.m4v\n")
    touch(folder / "videos" / f"test_{bare}", folder / "videos" / f"val_{bare}.mp4", folder / "videos" / "train_12@N0_1_a.mp4")
    return tmp_path


def test_didemo_paragraphs_join_the_descriptions_in_the_jsons_order_unstripped(didemo):
    assert by_id(read_clips("didemo", didemo))["test_12@N0_1_a.m4v"].captions == ("first.  second",)


def test_didemo_names_that_end_in_a_bare_dot_are_found_with_and_without_an_ending(didemo):
    clips, bare = by_id(read_clips("didemo", didemo)), "65430553@N08_7624593376_420700bd90."
    assert clips[f"test_{bare}"].path.name == f"test_{bare}" and clips[f"val_{bare}"].path.name == f"val_{bare}.mp4"
    assert clips["train_12@N0_1_a.m4v"].path.name == "train_12@N0_1_a.mp4"  # converted


def test_didemo_windows_are_the_first_thirty_seconds(didemo):
    assert {(clip.start, clip.end) for clip in read_clips("didemo", didemo)} == {(0.0, 30.0)}


def test_didemo_lists_name_the_videos_of_retrieval_and_without_them_it_says_so(didemo, capsys):
    assert Counter(clip.split for clip in read_clips("didemo", didemo)) == {"train": 2, "val": 2, "test": 2}
    assert capsys.readouterr().err == ""
    (didemo / "didemo" / "test_list.txt").unlink()
    assert Counter(clip.split for clip in read_clips("didemo", didemo)) == {"train": 2, "val": 2, "test": 3}
    assert "no test_list.txt" in capsys.readouterr().err


def test_real_didemo_paragraphs_equal_those_of_the_public_csv(realdata, tmp_path):
    import csv

    folder = realdata / "annotations" / "didemo"
    for split in ("train", "val"):
        write(tmp_path / f"{split}_data.json", json.dumps([didemo_item("a.mp4", "a")] if split == "train" else [didemo_item("b.mp4", "b")]))
        write(tmp_path / f"{split}_list.txt", "a.mp4\n" if split == "train" else "b.mp4\n")
    for name in ("test_data.json", "test_list.txt"):
        (tmp_path / name).symlink_to((folder / name).resolve())
    ours = {clip.id: clip.captions[0] for clip in read_clips("didemo", tmp_path, tmp_path) if clip.split == "test"}
    with (folder / "didemo_test_label.csv").open(newline="") as file:
        theirs = {row["video_path"].rsplit("/", 1)[1]: row["text"] for row in csv.DictReader(file)}
    assert len(ours) == 1004 and ours == theirs


# -------------------------------------------------------------------------------------------------------------------------- Charades


COLUMNS = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"


@pytest.fixture
def charades(tmp_path):
    def row(name: str) -> str:
        return f'{name},HR43,Kitchen,6,7,No,"A person, cooking, in {name}.",food;pan,One description.;Another.,c092 11.90 21.20,24.8'

    names = ["05124", "07E49", "YSKX3", "83654", *(f"AB{k:03d}" for k in range(16))]
    write(tmp_path / "charades" / "Charades_v1_train.csv", "\r\n".join([COLUMNS, *map(row, names)]) + "\r\n")
    write(tmp_path / "charades" / "Charades_v1_test.csv", "\r\n".join([COLUMNS, row("150E6"), row("00607")]) + "\r\n")
    touch(tmp_path / "charades" / "Charades_v1_480" / "05124.mp4")
    return tmp_path


def test_charades_ids_that_look_like_numbers_stay_strings(charades):
    clips = by_id(read_clips("charades", charades))
    assert {"05124", "07E49", "150E6", "00607"} <= clips.keys()
    assert clips["05124"].path == charades / "charades" / "Charades_v1_480" / "05124.mp4"


def test_charades_scripts_with_commas_and_crlf_are_whole_and_descriptions_unused(charades):
    assert by_id(read_clips("charades", charades))["150E6"].captions == ("A person, cooking, in 150E6.",)


def test_charades_validates_on_a_fixed_cut_of_the_training_videos(charades):
    clips = read_clips("charades", charades)
    assert Counter(clip.split for clip in clips) == {"train": 18, "val": 2, "test": 2}
    assert [clip.split for clip in clips] == [clip.split for clip in read_clips("charades", charades)]


def test_charades_files_spoilt_by_a_spreadsheet_are_named(charades):
    path = charades / "charades" / "Charades_v1_test.csv"
    write(path, f"{COLUMNS}\r\n5124,HR43,Kitchen,6,7,No,A script.,,,,\r\n")
    assert "row 2: '5124' is no video id" in message(read_clips, "charades", charades) and "spreadsheet" in message(read_clips, "charades", charades)
    write(path, f"{COLUMNS.replace(',script', '')}\r\n05124,HR43\r\n")
    assert "Charades_v1_test.csv needs the columns id,script" in message(read_clips, "charades", charades)


# ----------------------------------------------------------------------------------------------------------------------------- VATEX


UNDERSCORE, DASH = "_AKs_OGcgL0_000012_000022", "5-xGskbsBgI_000055_000065"


@pytest.fixture
def vatex(tmp_path):
    folder = tmp_path / "vatex"
    rest = [UNDERSCORE, *(f"abcdefghij{k}_000000_000010" for k in range(3))]
    for name, ids in {"training": [DASH, "-YJn8Je4GYw_000001_000011"], "validation": rest}.items():
        records = [{"videoID": i, "enCap": [f"A  caption {k} of {i}." for k in range(10)], "chCap": ["x"] * 10} for i in ids]
        write(folder / f"vatex_{name}_v1.0.json", json.dumps(records))
    write(folder / "val_list.txt", "\n".join(rest[1:3]))
    write(folder / "test_list.txt", "\n".join([rest[0], rest[3]]))
    touch(folder / "clips" / f"{DASH}.mp4", folder / "clips" / "_AKs_OGcgL0.mp4")
    return tmp_path


def test_vatex_ids_may_hold_underscores_and_dashes_within_their_eleven_characters(vatex):
    clips = by_id(read_clips("vatex", vatex))
    assert clips[DASH].path.name == f"{DASH}.mp4" and (clips[DASH].start, clips[DASH].end) == (0.0, None)
    assert clips[UNDERSCORE].path.name == "_AKs_OGcgL0.mp4" and (clips[UNDERSCORE].start, clips[UNDERSCORE].end) == (12.0, 22.0)


def test_vatex_captions_are_the_ten_english_ones_as_written(vatex):
    assert by_id(read_clips("vatex", vatex))[DASH].captions == tuple(f"A  caption {k} of {DASH}." for k in range(10))


def test_vatex_test_and_validation_are_halves_of_the_validation_set(vatex, capsys):
    splits = {clip.id: clip.split for clip in read_clips("vatex", vatex)}
    assert splits[UNDERSCORE] == "test" and Counter(splits.values()) == {"train": 2, "val": 2, "test": 2} and capsys.readouterr().err == ""
    (vatex / "vatex" / "test_list.txt").unlink()
    assert Counter(clip.split for clip in read_clips("vatex", vatex)) == {"train": 2, "val": 2, "test": 2}
    assert "do not compare with published ones" in capsys.readouterr().err


def test_real_vatex_records_are_read(realdata, vatex):
    records = json.loads((realdata / "annotations" / "vatex" / "videocap5data.json").read_text())
    write(vatex / "vatex" / "vatex_training_v1.0.json", json.dumps(records))
    clips = by_id(read_clips("vatex", vatex))
    assert all(clips[record["videoID"]].captions == tuple(record["enCap"]) for record in records) and len(records) == 5


# ------------------------------------------------------------------------------------------------------------------------------ MSVD


@pytest.fixture
def msvd(tmp_path):
    folder = tmp_path / "msvd"
    captions = {
        "-4wsuPCjDBc_5_15": ["a squirrel eats", "a chipmunk"],
        "bQJQGoJF7_k_162_169": ["a dog"],
        "eyhzdC936uk_15_27": ["a cat", "a cat", "one"],
    }
    write(folder / "captions_msvd.json", json.dumps(captions))
    for split, name in zip(("train", "val", "test"), captions):
        write(folder / f"{split}_list.txt", f"{name}\n")
    touch(folder / "YouTubeClips" / "-4wsuPCjDBc_5_15.avi")
    return tmp_path


def test_msvd_ids_that_start_with_a_dash_are_found(msvd):
    assert by_id(read_clips("msvd", msvd))["-4wsuPCjDBc_5_15"].path == msvd / "msvd" / "YouTubeClips" / "-4wsuPCjDBc_5_15.avi"


def test_msvd_keeps_all_captions_of_a_clip_equal_ones_too(msvd):
    assert by_id(read_clips("msvd", msvd))["eyhzdC936uk_15_27"].captions == ("a cat", "a cat", "one")


def test_msvd_pickled_word_lists_are_read_without_running_their_code(msvd):
    json_clips = read_clips("msvd", msvd)
    words = {clip.id: [caption.split() for caption in clip.captions] for clip in json_clips}
    (msvd / "msvd" / "captions_msvd.json").unlink()
    (msvd / "msvd" / "raw-captions.pkl").write_bytes(pickle.dumps(words))
    assert read_clips("msvd", msvd) == json_clips
    (msvd / "msvd" / "raw-captions.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "not a plain pickle" in message(read_clips, "msvd", msvd)


def test_real_msvd_files_are_read_whole(realdata):
    clips = read_clips("msvd", realdata, realdata / "annotations" / "msvd")
    assert Counter(clip.split for clip in clips) == {"train": 1200, "val": 100, "test": 670}
    captions = {split: sum(len(clip.captions) for clip in clips if clip.split == split) for split in ("train", "val", "test")}
    assert captions == {"train": 48_774, "val": 4_290, "test": 27_763}


# ------------------------------------------------------------------------------------------------------------------ of all of them


@pytest.mark.parametrize("dataset", list(data.READERS))
def test_missing_data_says_what_to_get_and_where_to_put_it(tmp_path, dataset):
    folder = tmp_path / dataset.split("-")[0]
    said = message(read_clips, dataset, tmp_path)
    assert f"{folder} is not a folder" in said and "--dataset shapes" in said
    folder.mkdir()
    said = message(read_clips, dataset, tmp_path)
    assert "not found below" in said and f"Put them anywhere below {folder}" in said and "\n" not in said


@pytest.mark.parametrize("dataset", list(data.READERS))
def test_annotations_may_lie_in_one_folder_and_videos_in_another(dataset, request, tmp_path):
    root = request.getfixturevalue(dataset.split("-")[0]) / dataset.split("-")[0]
    videos = tmp_path / "elsewhere"
    names = [path.name for path in root.rglob("*") if path.suffix in data.VIDEO_SUFFIXES]
    touch(*(videos / name for name in names))
    clips = read_clips(dataset, tmp_path / "nothing", root, videos)
    assert names and {clip.path for clip in clips if clip.path.is_file()} <= {videos / name for name in names}
    assert all(videos in clip.path.parents for clip in clips)


@pytest.mark.parametrize("dataset", list(data.READERS))
def test_no_clip_is_in_two_splits_and_every_split_has_clips(dataset, request):
    clips = read_clips(dataset, request.getfixturevalue(dataset.split("-")[0]))
    by_id(clips)
    assert {clip.split for clip in clips} == {"train", "val", "test"} and all(clip.captions for clip in clips)


def test_a_json_cut_short_and_one_of_another_form_are_named(msvd):
    write(msvd / "msvd" / "captions_msvd.json", '{"a": ["b"')
    assert "captions_msvd.json is no whole JSON file" in message(read_clips, "msvd", msvd)
    write(msvd / "msvd" / "captions_msvd.json", "[]")
    assert "another form than msvd's" in message(read_clips, "msvd", msvd)
    write(msvd / "msvd" / "captions_msvd.json", "{}")
    assert "no caption for -4wsuPCjDBc_5_15" in message(read_clips, "msvd", msvd)


# --------------------------------------------------------------------------------------------------------------------- your own data


def test_csv_gathers_the_captions_of_a_video(clips_folder, tmp_path):
    rows = 'video,caption,split\nclip00001.mp4,"a, b",train\nclip00002.mp4,c,test\nclip00001.mp4,d,train\n'
    one, two = read_csv(write(tmp_path / "a.csv", "\ufeff" + rows.replace("\n", "\r\n")), clips_folder / "clips")
    assert (one.id, one.captions, one.split, two.split) == ("clip00001.mp4", ("a, b", "d"), "train", "test")
    assert one.path == clips_folder / "clips" / "clip00001.mp4"


def test_csv_names_may_lack_their_suffix(clips_folder, tmp_path):
    (clip,) = read_csv(write(tmp_path / "a.csv", "video,caption,split\nclip00001,c,train\n"), clips_folder / "clips")
    assert clip.path.name == "clip00001.mp4" and clip.id == "clip00001"


def test_csv_without_splits_is_cut_by_the_names_alone(clips_folder, tmp_path):
    names = [f"clip{k:05d}.mp4" for k in range(24)]
    forth, back = (
        {c.id: c.split for c in read_csv(write(tmp_path / "a.csv", "video,caption\n" + "".join(f"{n},c\n" for n in order)), clips_folder / "clips")}
        for order in (names, names[::-1])
    )
    assert forth == back and Counter(forth.values()) == {"train": 20, "val": 2, "test": 2}


@pytest.mark.parametrize(
    "rows,says",
    [
        ("clip,text\na,b\n", "needs the columns video,caption.*found: clip, text"),
        ("", "found: nothing"),
        ("video,caption,split\nclip00001.mp4,,train\n", "row 2: the caption is empty"),
        ("video,caption,split\nclip00001.mp4,a,train\nclip00001.mp4,b,test\n", "row 3: clip00001.mp4 is in two splits"),
        ("video,caption,split\nclip00001.mp4,a,dev\n", "must be train, val or test"),
        ("video,caption,start,end\nclip00001.mp4,a,one,\n", "start and end are seconds"),
        ("video,caption,start,end\nclip00001.mp4,a,2,1\n", "end must be later than start"),
    ],
)
def test_csv_mistakes_are_named(clips_folder, tmp_path, rows, says):
    with pytest.raises(data.DataError, match=says):
        read_csv(write(tmp_path / "a.csv", rows), clips_folder / "clips")


def test_missing_files_and_foreign_encodings_are_named(clips_folder, tmp_path):
    assert "gone.csv not found" in message(read_csv, tmp_path / "gone.csv", clips_folder / "clips")
    assert "is not a folder" in message(read_csv, clips_folder / "clips.csv", tmp_path / "gone")
    (tmp_path / "latin.csv").write_bytes("video,caption\na,caf\xe9\n".encode("latin-1"))
    assert "UTF-8" in message(read_csv, tmp_path / "latin.csv", clips_folder / "clips")


def test_an_empty_split_and_an_unknown_data_set_are_named(clips, tmp_path):
    assert "no clip has split 'val'" in message(data.of_split, [c for c in clips if c.split != "val"], "val")
    assert "choose one of shapes, csv" in message(read_clips, "imagenet", tmp_path)
    assert "--annotations FILE" in message(read_clips, "csv", tmp_path)


def test_real_captions_file_is_read_whole(realdata):
    clips = read_csv(realdata / "captions.csv", realdata / "clips")
    assert len(clips) == 26 and {clip.split for clip in clips} == {"train", "val", "test"}


def test_csv_rows_with_windows_are_clips_of_their_own(clips_folder, tmp_path):
    rows = "video,caption,split,start,end\nclip00001.mp4,a,train,0,1.5\nclip00001.mp4,b,train,1.5,\nclip00001.mp4,c,train,0,1.5\n"
    one, two = read_csv(write(tmp_path / "a.csv", rows), clips_folder / "clips")
    assert (one.captions, one.start, one.end, two.captions, two.start, two.end) == (("a", "c"), 0.0, 1.5, ("b",), 1.5, None)


def test_csv_windows_of_one_video_stay_in_one_split(clips_folder, tmp_path):
    rows = "video,caption,start,end\n" + "".join(f"clip{k:05d}.mp4,c,{s},{s + 1}\n" for k in range(20) for s in range(3))
    splits: dict = {}
    for clip in read_csv(write(tmp_path / "a.csv", rows), clips_folder / "clips"):
        splits.setdefault(clip.path, set()).add(clip.split)
    assert len(splits) == 20 and all(len(split) == 1 for split in splits.values())
    assert Counter(split for (split,) in splits.values()) == {"train": 16, "val": 2, "test": 2}


def test_jsonl_is_csv_with_an_object_a_line(clips_folder, tmp_path):
    lines = [
        {"video": "clip00001.mp4", "caption": 'a "b", c', "split": "train"},
        {"video": "clip00002.mp4", "caption": "d", "split": "val", "end": 1},
    ]
    one, two = read_csv(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines))), clips_folder / "clips")
    assert (one.captions, one.split, two.end) == (('a "b", c',), "train", 1.0)
    assert "is not JSONL" in message(read_csv, write(tmp_path / "b.jsonl", "video,caption\n"), clips_folder / "clips")


def test_csv_videos_that_are_not_there_are_listed_all_the_same(clips_folder, tmp_path):
    """They are left to the policy: training skips them, evaluation refuses."""
    (clip,) = read_csv(write(tmp_path / "a.csv", "video,caption,split\ngone.mp4,a,train\n"), clips_folder / "clips")
    assert clip.path == clips_folder / "clips" / "gone.mp4"
