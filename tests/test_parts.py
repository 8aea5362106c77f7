"""Parts of the work: every name belongs to one of them, on every machine the same."""

import re

import pytest
import test_library
import test_search

import data
import search
from engine.files import DataError
from engine.indexing import IndexConfig
from engine.library import Library
from engine.parts import Part, part_of

checkpoint, rendered, indexed = test_search.checkpoint, test_search.rendered, test_search.indexed  # fixtures
NAMES = [f"трое {n}.mp4" for n in range(40)] + ["caf\udce9.mp4"]


def slurm(ID: str, COUNT: str, **more: str) -> dict[str, str]:
    """The environment of a task of an array job."""
    return {f"SLURM_ARRAY_TASK_{name}": text for name, text in {"ID": ID, "COUNT": COUNT, **more}.items()}


@pytest.mark.parametrize("count", [1, 3, 16])
def test_every_name_belongs_to_one_part(count):
    parts = [Part(number, count).of(NAMES) for number in range(1, count + 1)]
    assert sorted(name for part in parts for name in part) == sorted(NAMES)
    assert count == 1 or max(map(len, parts)) < 25
    assert Part(1, 2).of(NAMES[:6]) == [f"трое {n}.mp4" for n in (0, 1, 2, 4, 5)]  # everywhere


@pytest.mark.parametrize(
    ("flag", "environment", "part"),
    [
        (None, {}, Part(1, 1)),
        ("3/16", {"RANK": "0", "WORLD_SIZE": "2"}, Part(3, 16)),
        (None, {"RANK": "0", "WORLD_SIZE": "2"}, Part(1, 2)),
        (None, {"RANK": "1", "WORLD_SIZE": "2"}, Part(2, 2)),
        (None, {"RANK": "x", "WORLD_SIZE": "2"}, Part(1, 1)),
        (None, slurm("0", "3") | {"RANK": "1"}, Part(1, 3)),
        (None, slurm("7", "3", MIN="5"), Part(3, 3)),
        (None, slurm("5", "3", MIN="1", STEP="2"), Part(3, 3)),
    ],
)
def test_the_part_is_that_of_the_flag_else_of_slurm_else_of_torchrun(flag, environment, part):
    assert part_of(flag, environment) == part


@pytest.mark.parametrize("flag", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/4", ""])
def test_what_is_no_part_gives_one_sentence(flag):
    with pytest.raises(DataError, match=r"is no part: give the number"):
        part_of(flag, {})
    with pytest.raises(DataError, match="is no part"):
        part_of(None, {"RANK": "2", "WORLD_SIZE": "2"})


def test_the_parts_of_a_cache_are_together_the_cache_of_one_process(clips_folder, tmp_path, capsys):
    files = dict(dataset="csv", annotations=clips_folder / "clips.csv", videos=clips_folder / "clips")
    assert data.cache(data=tmp_path / "whole", **files) == 0
    for number in (2, 3, 1):
        assert data.cache(data=tmp_path / "parts", part=f"{number}/3", **files) == 0
    whole, parts = (sorted(path.name for path in (tmp_path / f).rglob("*.zip")) for f in ("whole", "parts"))
    assert whole == parts and len(whole) == 24
    out = capsys.readouterr().out
    assert re.findall(r"part (\d/3): \d+ of 24 clips", out) == ["2/3", "3/3", "1/3"]


def test_parts_of_a_local_library_are_together_that_of_one_process(
    rendered, checkpoint, indexed, tmp_path, capsys
):
    folder, where = test_search.copy_videos(tmp_path / "videos", rendered), str(tmp_path / "library.db")
    for number in (2, 3, 1, 2):  # the last one again: nothing is left to do
        assert search.index(IndexConfig(folder, where, checkpoint, part=f"{number}/3")) == 0
    assert re.search(r"part 2/3: 0 new, 0 read again, 0 removed, \d unchanged", capsys.readouterr().out)
    test_library.assert_same(Library(where), Library(indexed[0]))
    (folder / "b.mp4").unlink()
    number = next(number for number in (1, 2, 3) if Part(number, 3).has("b.mp4"))
    for other in {1, 2, 3} - {number}:
        assert search.index(IndexConfig(folder, where, part=f"{other}/3")) == 0
    assert "b.mp4" in Library(where).files()
    assert search.index(IndexConfig(folder, where, part=f"{number}/3")) == 0
    assert "b.mp4" not in Library(where).files()
