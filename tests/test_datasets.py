"""Readers: each trap of the annotation files has a test named after it, on small files of the true format."""

import csv
import json
import multiprocessing.dummy
import pickle
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import message

import shapes
from engine.datasets import (
    DATASETS,
    SPLITS,
    Clip,
    Files,
    cache_folder,
    of_split,
    read_clips,
    read_csv,
    register,
    with_validation,
)
from engine.files import VIDEO_SUFFIXES
from engine.metrics import relevance_metrics

PUBLIC = [name for name, dataset in DATASETS.items() if dataset.needs]


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


def sizes(clips) -> dict[str, int]:
    """The number of clips of each split."""
    return Counter(clip.split for clip in clips)


# ---- the registry


def test_a_new_data_set_is_one_registered_reader(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.datasets.DATASETS", {**DATASETS})  # the toy is gone after the test

    @register("toy", needs=("list.txt",), also="the videos of example.org")
    def read_toy(files: Files) -> Iterator[Clip]:
        """A video a line."""
        for name in files.lines("list.txt"):
            yield Clip(name, files.video(name), (f"caption of {name}",), "train")

    @register("toy-two", like="toy")
    def read_toy_two(files: Files) -> Iterator[Clip]:
        """The same files."""
        return read_toy(files)

    assert "toy needs list.txt and the videos of example.org" in message(read_clips, "toy-two", tmp_path)
    write(tmp_path / "toy" / "list.txt", "a\nb\n")
    touch(tmp_path / "toy" / "a.mp4")
    clips = read_clips("toy", tmp_path)
    assert [(clip.id, clip.path.name, clip.captions) for clip in clips] == [
        ("a", "a.mp4", ("caption of a",)),
        ("b", "b", ("caption of b",)),
    ]
    assert read_clips("toy-two", tmp_path) == clips
    assert cache_folder("toy-two", tmp_path) == cache_folder("toy", tmp_path) == tmp_path / "cache" / "toy"
    write(tmp_path / "toy" / "list.txt", "a\na\n")
    assert "have a twice (train, train)" in message(read_clips, "toy", tmp_path)


def test_caches_are_apart_for_each_data_set_and_for_each_folder_of_your_own_videos(tmp_path):
    own = [cache_folder("csv", tmp_path, tmp_path / name) for name in ("one", "two", "one/../one")]
    assert own[0] == own[2] != own[1] and re.fullmatch("csv-[0-9a-f]{8}", own[0].name)
    assert cache_folder("msrvtt-7k", tmp_path) == tmp_path / "cache" / "msrvtt"
    assert cache_folder("msvd", tmp_path) != cache_folder("shapes", tmp_path)


# ---- built in


@pytest.mark.parametrize("name", shapes.TEST_SETS)
def test_another_built_in_test_set_is_rendered_and_its_relevance_is_known(name, tmp_path, monkeypatch):
    made = shapes.TEST_SETS[name]
    monkeypatch.setitem(made["splits"], "test", 60)
    monkeypatch.setattr(shapes, "_render_clips", one_file_each)
    own = multiprocessing.get_context()
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda kind="": multiprocessing.dummy if kind else own
    )
    clips = read_clips(name, tmp_path)
    assert sizes(clips) == made["splits"] and clips[7].path.parent == tmp_path / name / "clips"
    right = [shapes.make_clip(made["seed"], n, made.get("scenes", (3,))) for n in range(len(clips))]
    assert [clip.captions for clip in clips] == [tuple(c.text for c in clip.captions) for clip in right]
    some = [clips[n] for n in (3, 40, 14, 0)]  # also of a part of the clips, in any order
    relevant, owner = DATASETS[name].relevance(some), np.arange(4).repeat(5)
    assert relevant.shape == (20, 4) and relevant[np.arange(20), owner].all() and not relevant.all()
    perfect = torch.from_numpy(relevant).float()  # the scores of a retriever that understands everything
    assert relevance_metrics(perfect, torch.from_numpy(relevant))["mAP@R"] == pytest.approx(100)
    assert DATASETS["shapes"].relevance(some) is None  # the captions of other clips


def one_file_each(job, scenes=()):
    """Writes an empty file for each clip of a job."""
    touch(*(job[0] / f"clip{number:05d}.mp4" for number in job[2]))
    return len(job[2])


# ---- MSR-VTT


@pytest.fixture
def msrvtt(tmp_path):
    """Ten clips: 0-5 train (4 and 5 are officially validation), 6-9 test; 1k-A tests 6 and 7."""
    official = ["train"] * 4 + ["validate"] * 2 + ["test"] * 4
    videos = [
        {"video_id": f"video{k}", "split": split, "start time": 1.5, "id": k}
        for k, split in enumerate(official)
    ]
    sentences = [
        {"caption": f"caption {n}  of {k}", "video_id": f"video{k}", "sen_id": 10 * n + k}
        for n in range(3)
        for k in (3, 0, 1, 2, 9, 8, 7, 6, 5, 4)
    ]
    folder = tmp_path / "msrvtt"
    write(folder / "MSRVTT_data.json", json.dumps({"info": {}, "videos": videos, "sentences": sentences}))
    write(folder / "lists" / "MSRVTT_train.9k.csv", "video_id\n" + "".join(f"video{k}\n" for k in range(6)))
    write(folder / "lists" / "MSRVTT_train.7k.csv", "video_id\nvideo0\nvideo1\nvideo5")  # no last line end
    rows = "".join(f"ret{k},msr{k},video{k},a man playing video games\n" for k in (6, 7))
    write(folder / "lists" / "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\n" + rows)
    touch(*(folder / "videos" / "all" / f"video{k}.mp4" for k in range(10)))
    return tmp_path


def test_msrvtt_sentences_in_any_order_are_gathered_by_their_video(msrvtt):
    clips = by_id(read_clips("msrvtt", msrvtt))
    assert clips["video2"].captions == ("caption 0  of 2", "caption 1  of 2", "caption 2  of 2")
    assert clips["video2"].path == msrvtt / "msrvtt" / "videos" / "all" / "video2.mp4"


def test_msrvtt_9k_trains_without_the_official_validation_clips(msrvtt):
    clips = read_clips("msrvtt", msrvtt)
    assert sizes(clips) == {"train": 4, "val": 2, "test": 2}
    assert {clip.id for clip in clips if clip.split == "val"} == {"video4", "video5"}


@pytest.mark.parametrize("val, train", [("official", 4), ("none", 6), ("2", 4)])
def test_msrvtt_9k_trains_on_all_clips_of_its_list_or_validates_elsewhere(msrvtt, val, train):
    clips = with_validation(read_clips("msrvtt", msrvtt), val, seed=0)
    assert sizes(clips) == {"train": train, "val": 6 - train, "test": 2} or (
        val == "none" and sizes(clips) == {"train": 6, "test": 2}
    )
    assert {clip.id for clip in clips if clip.split != "test"} == {f"video{k}" for k in range(6)}


def test_validation_is_taken_out_of_training_by_the_seed(msrvtt):
    clips = read_clips("msrvtt", msrvtt)
    chosen = [
        {clip.id for clip in of_split(with_validation(clips, "2", s), "val")} for s in (0, 0, *range(9))
    ]
    assert chosen[0] == chosen[1] and len({frozenset(names) for names in chosen}) > 2
    assert "--val 6 leaves none of the 6 training videos" in message(with_validation, clips, "6", 0)


def test_a_validation_of_its_own_never_becomes_training_data(msrvtt):
    clips = read_clips("msrvtt-full", msrvtt)
    none, one = (with_validation(clips, val, seed=0) for val in ("none", "1"))
    assert sizes(none) == {"train": 4, "test": 4} and sizes(one) == {"train": 3, "val": 1, "test": 4}
    assert not {"video4", "video5"} & {clip.id for clip in [*none, *one]}


def test_windows_of_a_file_are_held_out_together(tmp_path):
    touch(*(tmp_path / f"{k}.mp4" for k in range(4)))
    rows = "".join(f"{k}.mp4,a caption,train,{s},{s + 1}\n" for k in range(4) for s in range(3))
    write(tmp_path / "own.csv", "video,caption,split,start,end\n" + rows)
    clips = with_validation(read_csv(tmp_path / "own.csv", tmp_path), "1", seed=0)
    assert sizes(clips) == {"train": 9, "val": 3}
    assert len({clip.path for clip in clips if clip.split == "val"}) == 1


def test_msrvtt_test_ids_are_the_third_column_and_equal_sentences_stay_apart(msrvtt):
    test = [clip for clip in read_clips("msrvtt", msrvtt) if clip.split == "test"]
    assert [clip.id for clip in test] == ["video6", "video7"]
    assert {clip.captions for clip in test} == {("a man playing video games",)}


def test_msrvtt_7k_list_without_a_last_line_end_is_read_whole(msrvtt):
    splits = {clip.id: clip.split for clip in read_clips("msrvtt-7k", msrvtt)}
    expected = {0: "train", 1: "train", 5: "val", 6: "test", 7: "test"}
    assert splits == {f"video{k}": split for k, split in expected.items()}


def test_msrvtt_full_takes_the_official_splits_and_every_caption(msrvtt):
    clips = read_clips("msrvtt-full", msrvtt)
    assert sizes(clips) == {"train": 4, "val": 2, "test": 4}
    assert all(len(clip.captions) == 3 for clip in clips)


def test_msrvtt_without_official_splits_validates_on_a_fixed_held_out_part(msrvtt):
    path = msrvtt / "msrvtt" / "MSRVTT_data.json"
    content = json.loads(path.read_text())
    write(path, json.dumps({"sentences": content["sentences"]}))
    one, two = ({clip.id for clip in read_clips("msrvtt", msrvtt) if clip.split == "val"} for _ in range(2))
    assert one == two and len(one) == 1
    assert re.search(r"give video\d no split", message(read_clips, "msrvtt-full", msrvtt))


def test_real_msrvtt_files_are_read_whole(realdata):
    folder = realdata / "annotations" / "msrvtt"
    names = {"MSRVTT_data.json": "MSRVTT_data.rebuilt_1cap.json"}  # the true structure, under another name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Files, "annotation", lambda self, name: folder / names.get(name, name))
        nine, seven = (read_clips(name, folder, folder) for name in ("msrvtt", "msrvtt-7k"))
    assert sizes(nine) == {"train": 8100, "val": 900, "test": 1000}
    assert sizes(seven) == {"train": 6309, "val": 701, "test": 1000}
    assert by_id(nine)["video9770"].captions == ("a person is connecting something to system",)


# ---- LSMDC


TIMES = "00.03.07.170\t00.03.09.675\t00.03.07.170\t00.03.09.675"
LONG = "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675"
BEAUTY = "0001_American_Beauty_00.00.51.926-00.00.54.129"


@pytest.fixture
def lsmdc(tmp_path):
    folder = tmp_path / "lsmdc"
    sentences = [
        (LONG, "SOMEONE runs, and falls."),
        (BEAUTY, "Her mind wanders for a beat."),
        (LONG, "A second sentence."),
    ]
    lines = [f"{clip}\t{TIMES}\t{sentence}" for clip, sentence in sentences]
    write(folder / "LSMDC16_annos_training.csv", "\r\n".join(lines) + "\r\n")
    quoted = f'"1001_Flight_00.00.01.000-00.00.03.000\t{TIMES}\tSOMEONE says ""stop"", and leaves."\n'
    write(folder / "LSMDC16_annos_val.csv", quoted)
    stray = f'"1002_Up_00.00.01.000-00.00.03.000\t{TIMES}\tA house flies.\n'
    write(folder / "LSMDC16_challenge_1000_publictect.csv", stray)
    touch(folder / "clips" / "3009_BATTLE_LOS_ANGELES" / f"{LONG}.avi")
    return tmp_path


def test_lsmdc_files_are_tab_separated_without_header_whatever_their_name(lsmdc):
    clips = by_id(read_clips("lsmdc", lsmdc))
    assert sizes(clips.values()) == {"train": 2, "val": 1, "test": 1}
    assert clips[BEAUTY].captions == ("Her mind wanders for a beat.",)


def test_lsmdc_repeated_clip_ids_keep_every_caption(lsmdc):
    captions = by_id(read_clips("lsmdc", lsmdc))[LONG].captions
    assert captions == ("SOMEONE runs, and falls.", "A second sentence.")


def test_lsmdc_ids_with_many_dots_name_their_movies_folder(lsmdc):
    clips, folder = by_id(read_clips("lsmdc", lsmdc)), lsmdc / "lsmdc"
    assert clips[LONG].path == folder / "clips" / "3009_BATTLE_LOS_ANGELES" / f"{LONG}.avi"
    assert clips[BEAUTY].path == folder / "0001_American_Beauty" / f"{BEAUTY}.avi"  # missing


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


# ---- DiDeMo


def didemo_item(video: str, text: str) -> dict:
    rest = {"num_segments": 6, "dl_link": "https://", "times": [[4, 4]] * 4, "annotation_id": 1}
    return {"description": text, "video": video, **rest}


@pytest.fixture
def didemo(tmp_path):
    folder = tmp_path / "didemo"
    bare = "65430553@N08_7624593376_420700bd90."
    texts = [("12@N0_1_a.m4v", "first. "), (bare, "someone kicks"), ("12@N0_1_a.m4v", "second")]
    for split, extra in {"train": "t.mov", "val": "v.wmv", "test": "not retrieved.3gp"}.items():
        items = [didemo_item(f"{split}_{video}", text) for video, text in texts] + [didemo_item(extra, "one")]
        write(folder / f"{split}_data.json", json.dumps(items))
        write(folder / f"{split}_list.txt", f"{split}_{bare}\n{split}_12@N0_1_a.m4v\n")
    touch(*(folder / "videos" / name for name in (f"test_{bare}", f"val_{bare}.mp4", "train_12@N0_1_a.mp4")))
    return tmp_path


def test_didemo_paragraphs_join_the_descriptions_in_the_jsons_order_unstripped(didemo):
    assert by_id(read_clips("didemo", didemo))["test_12@N0_1_a.m4v"].captions == ("first.  second",)


def test_didemo_names_that_end_in_a_bare_dot_are_found_with_and_without_an_ending(didemo):
    clips, bare = by_id(read_clips("didemo", didemo)), "65430553@N08_7624593376_420700bd90."
    assert clips[f"test_{bare}"].path.name == f"test_{bare}"
    assert clips[f"val_{bare}"].path.name == f"val_{bare}.mp4"
    assert clips["train_12@N0_1_a.m4v"].path.name == "train_12@N0_1_a.mp4"  # converted


def test_didemo_windows_are_the_first_thirty_seconds(didemo):
    assert {(clip.start, clip.end) for clip in read_clips("didemo", didemo)} == {(0.0, 30.0)}


def test_didemo_lists_name_the_videos_of_retrieval_and_without_them_it_says_so(didemo, capsys):
    assert sizes(read_clips("didemo", didemo)) == {"train": 2, "val": 2, "test": 2}
    assert capsys.readouterr().err == ""
    (didemo / "didemo" / "test_list.txt").unlink()
    assert sizes(read_clips("didemo", didemo)) == {"train": 2, "val": 2, "test": 3}
    assert "no test_list.txt" in capsys.readouterr().err


def test_real_didemo_paragraphs_equal_those_of_the_public_csv(realdata, tmp_path):
    folder = realdata / "annotations" / "didemo"
    for split in ("train", "val"):
        write(tmp_path / f"{split}_data.json", json.dumps([didemo_item(f"{split}.mp4", "a")]))
        write(tmp_path / f"{split}_list.txt", f"{split}.mp4\n")
    for name in ("test_data.json", "test_list.txt"):
        (tmp_path / name).symlink_to((folder / name).resolve())
    test = of_split(read_clips("didemo", tmp_path, tmp_path), "test")
    ours = {clip.id: clip.captions[0] for clip in test}
    with (folder / "didemo_test_label.csv").open(newline="") as file:
        theirs = {row["video_path"].rsplit("/", 1)[1]: row["text"] for row in csv.DictReader(file)}
    assert len(ours) == 1004 and ours == theirs


# ---- Charades


COLUMNS = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"


@pytest.fixture
def charades(tmp_path):
    def row(name: str) -> str:
        script = f'"A person, cooking, in {name}."'
        return f"{name},HR43,Kitchen,6,7,No,{script},food;pan,One description.;Another.,c092 11.90 21.20,24.8"

    names = ["05124", "07E49", "YSKX3", "83654", *(f"AB{k:03d}" for k in range(16))]
    write(tmp_path / "charades" / "Charades_v1_train.csv", "\r\n".join([COLUMNS, *map(row, names)]) + "\r\n")
    test = [COLUMNS, row("150E6"), row("00607")]
    write(tmp_path / "charades" / "Charades_v1_test.csv", "\r\n".join(test) + "\r\n")
    touch(tmp_path / "charades" / "Charades_v1_480" / "05124.mp4")
    return tmp_path


def test_charades_ids_that_look_like_numbers_stay_strings(charades):
    clips = by_id(read_clips("charades", charades))
    assert {"05124", "07E49", "150E6", "00607"} <= clips.keys()
    assert clips["05124"].path == charades / "charades" / "Charades_v1_480" / "05124.mp4"


def test_charades_scripts_with_commas_and_crlf_are_whole_and_descriptions_unused(charades):
    assert by_id(read_clips("charades", charades))["150E6"].captions == ("A person, cooking, in 150E6.",)


def test_charades_validates_on_a_fixed_held_out_part_of_the_training_videos(charades):
    clips = read_clips("charades", charades)
    assert sizes(clips) == {"train": 18, "val": 2, "test": 2}
    assert [clip.split for clip in clips] == [clip.split for clip in read_clips("charades", charades)]


def test_charades_files_spoilt_by_a_spreadsheet_are_named(charades):
    path = charades / "charades" / "Charades_v1_test.csv"
    write(path, f"{COLUMNS}\r\n5124,HR43,Kitchen,6,7,No,A script.,,,,\r\n")
    said = message(read_clips, "charades", charades)
    assert "row 2: '5124' is not a video id" in said and "spreadsheet" in said
    write(path, f"{COLUMNS.replace(',script', '')}\r\n05124,HR43\r\n")
    assert "Charades_v1_test.csv needs the columns id,script" in message(read_clips, "charades", charades)


# ---- VATEX


UNDERSCORE, DASH = "_AKs_OGcgL0_000012_000022", "5-xGskbsBgI_000055_000065"


@pytest.fixture
def vatex(tmp_path):
    folder = tmp_path / "vatex"
    rest = [UNDERSCORE, *(f"abcdefghij{k}_000000_000010" for k in range(3))]
    for name, ids in {"training": [DASH, "-YJn8Je4GYw_000001_000011"], "validation": rest}.items():
        records = [
            {"videoID": i, "enCap": [f"A  caption {k} of {i}." for k in range(10)], "chCap": ["x"] * 10}
            for i in ids
        ]
        write(folder / f"vatex_{name}_v1.0.json", json.dumps(records))
    write(folder / "val_list.txt", "\n".join(rest[1:3]))
    write(folder / "test_list.txt", "\n".join([rest[0], rest[3]]))
    touch(folder / "clips" / f"{DASH}.mp4", folder / "clips" / "_AKs_OGcgL0.mp4")
    return tmp_path


def test_vatex_ids_may_hold_underscores_and_dashes_within_their_eleven_characters(vatex):
    clips = by_id(read_clips("vatex", vatex))
    own, whole = clips[DASH], clips[UNDERSCORE]
    assert (own.path.name, own.start, own.end) == (f"{DASH}.mp4", 0.0, None)
    assert (whole.path.name, whole.start, whole.end) == ("_AKs_OGcgL0.mp4", 12.0, 22.0)


def test_vatex_captions_are_the_ten_english_ones_as_written(vatex):
    captions = by_id(read_clips("vatex", vatex))[DASH].captions
    assert captions == tuple(f"A  caption {k} of {DASH}." for k in range(10))


def test_vatex_test_and_validation_are_halves_of_the_validation_set(vatex, capsys):
    clips = read_clips("vatex", vatex)
    assert by_id(clips)[UNDERSCORE].split == "test" and sizes(clips) == {"train": 2, "val": 2, "test": 2}
    assert capsys.readouterr().err == ""
    (vatex / "vatex" / "test_list.txt").unlink()
    assert sizes(read_clips("vatex", vatex)) == {"train": 2, "val": 2, "test": 2}
    assert "do not compare with published ones" in capsys.readouterr().err


def test_real_vatex_records_are_read(realdata, vatex):
    records = json.loads((realdata / "annotations" / "vatex" / "videocap5data.json").read_text())
    write(vatex / "vatex" / "vatex_training_v1.0.json", json.dumps(records))
    clips = by_id(read_clips("vatex", vatex))
    assert len(records) == 5
    assert all(clips[record["videoID"]].captions == tuple(record["enCap"]) for record in records)


# ---- MSVD


@pytest.fixture
def msvd(tmp_path):
    folder = tmp_path / "msvd"
    captions = {
        "-4wsuPCjDBc_5_15": ["a squirrel eats", "a chipmunk"],
        "bQJQGoJF7_k_162_169": ["a dog"],
        "eyhzdC936uk_15_27": ["a cat", "a cat", "one"],
    }
    write(folder / "captions_msvd.json", json.dumps(captions))
    for split, name in zip(SPLITS, captions):
        write(folder / f"{split}_list.txt", f"{name}\n")
    touch(folder / "YouTubeClips" / "-4wsuPCjDBc_5_15.avi")
    return tmp_path


def test_msvd_ids_that_start_with_a_dash_are_found(msvd):
    path = by_id(read_clips("msvd", msvd))["-4wsuPCjDBc_5_15"].path
    assert path == msvd / "msvd" / "YouTubeClips" / "-4wsuPCjDBc_5_15.avi"


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
    assert sizes(clips) == {"train": 1200, "val": 100, "test": 670}
    captions = [sum(len(clip.captions) for clip in of_split(clips, split)) for split in SPLITS]
    assert captions == [48_774, 4_290, 27_763]


# ---- of all of them


@pytest.mark.parametrize("dataset", PUBLIC)
def test_missing_data_says_what_to_get_and_where_to_put_it(tmp_path, dataset):
    folder = tmp_path / dataset.split("-")[0]
    said = message(read_clips, dataset, tmp_path)
    assert f"{folder} is not a folder" in said and "--dataset shapes" in said
    folder.mkdir()
    said = message(read_clips, dataset, tmp_path)
    assert "not found below" in said and f"Put them anywhere below {folder}" in said and "\n" not in said


@pytest.mark.parametrize("dataset", PUBLIC)
def test_annotations_may_lie_in_one_folder_and_videos_in_another(dataset, request, tmp_path):
    root = request.getfixturevalue(dataset.split("-")[0]) / dataset.split("-")[0]
    videos = tmp_path / "elsewhere"
    names = [path.name for path in root.rglob("*") if path.suffix in VIDEO_SUFFIXES]
    touch(*(videos / name for name in names))
    clips = read_clips(dataset, tmp_path / "nothing", root, videos)
    assert names and {clip.path for clip in clips if clip.path.is_file()} <= {videos / name for name in names}
    assert all(videos in clip.path.parents for clip in clips)


@pytest.mark.parametrize("dataset", PUBLIC)
def test_no_clip_is_in_two_splits_and_every_split_has_clips(dataset, request):
    clips = read_clips(dataset, request.getfixturevalue(dataset.split("-")[0]))
    by_id(clips)
    assert {*sizes(clips)} == {*SPLITS} and all(clip.captions for clip in clips)


def test_an_incomplete_json_and_one_of_another_form_are_named(msvd):
    write(msvd / "msvd" / "captions_msvd.json", '{"a": ["b"')
    assert "captions_msvd.json is not a complete JSON file" in message(read_clips, "msvd", msvd)
    write(msvd / "msvd" / "captions_msvd.json", "[]")
    assert "another form than msvd's" in message(read_clips, "msvd", msvd)
    write(msvd / "msvd" / "captions_msvd.json", "{}")
    assert "no caption for -4wsuPCjDBc_5_15" in message(read_clips, "msvd", msvd)


@pytest.mark.parametrize("caption", [1, None, ["a"], "a\0", "\ud800", float("nan")])
def test_what_is_no_caption_in_a_public_data_set_is_named(msvd, caption):
    write(msvd / "msvd" / "captions_msvd.json", json.dumps({"-4wsuPCjDBc_5_15": ["a", caption]}))
    said = message(read_clips, "msvd", msvd)
    assert f"have {json.dumps(caption)} for -4wsuPCjDBc_5_15, " in said and said.isprintable()


def test_one_text_in_place_of_a_list_is_not_read_as_letters(msvd, vatex):
    write(msvd / "msvd" / "captions_msvd.json", json.dumps({"-4wsuPCjDBc_5_15": "a squirrel"}))
    assert 'have "a squirrel" for -4wsuPCjDBc_5_15, not a list' in message(read_clips, "msvd", msvd)
    records = [{"videoID": DASH, "enCap": "a squirrel"}]
    write(vatex / "vatex" / "vatex_training_v1.0.json", json.dumps(records))
    assert f'have "a squirrel" for {DASH}, not a list' in message(read_clips, "vatex", vatex)


def test_ids_that_no_file_can_have_and_endless_windows_are_named(vatex):
    def said(name: str) -> str:
        records = [{"videoID": name, "enCap": ["a"]}]
        write(vatex / "vatex" / "vatex_training_v1.0.json", json.dumps(records))
        return message(read_clips, "vatex", vatex)

    for name in ("a\0b", "\ud800_000000_000010"):
        assert f"have the id {json.dumps(name)}, which is no name of a video" in said(name)
    for window in ("nan_000010", "000000_inf", "000010_000010"):
        assert f"give _AKs_OGcgL0_{window} an empty or endless window" in said(f"_AKs_OGcgL0_{window}")
    assert "another form than vatex's" in said("_AKs_OGcgL0_a_b")


def test_lists_of_names_may_have_blanks_around_them(msvd):
    write(msvd / "msvd" / "train_list.txt", " -4wsuPCjDBc_5_15 \r\n\n")
    assert by_id(read_clips("msvd", msvd))["-4wsuPCjDBc_5_15"].captions == ("a squirrel eats", "a chipmunk")
