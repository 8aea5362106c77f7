"""The library of search.py: its rows, vectors, file names and errors (test_search.py indexes folders)."""

import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randn, random_model
from torch import nn

import model as model_file
from engine.files import DataError, ModelError
from engine.library import Library, filmstrip, identity, overall, span, stamp
from model import MeanPool, XPool

FRAMES, DIM = 4, 24
ABOUT = {"folder": "/videos", "source": {}, "model": "none", "cut": "whole", "dim": DIM, "frames": FRAMES}


def contents(library: Library) -> dict[tuple[str, float], bytes]:
    """The features of each clip of a library, by file and start."""
    rows, frames = [], []
    for some, features in library.batches():
        rows, frames = rows + some, [*frames, *features]
    names = library.names([row["id"] for row in rows])
    assert {*library.thumbnails([row["id"] for row in rows])} == {row["id"] for row in rows}
    return {(name, row["start"]): f.numpy().tobytes() for name, row, f in zip(names, rows, frames)}


def assert_same(library: Library, other: Library) -> None:
    """The same clips and features. Batches of other sizes differ in float16's last bit."""
    found, expected = contents(library), contents(other)
    assert found.keys() == expected.keys()
    for clip in found:
        features = [np.frombuffer(each[clip], np.float32) for each in (found, expected)]
        np.testing.assert_allclose(*features, rtol=2e-3, atol=1e-4)


def sentence(function, *arguments, **options) -> str:
    """The one sentence of the error that a call raises."""
    with pytest.raises((DataError, ModelError)) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


class LastFrame(nn.Module):
    """An unknown psi: the frame nearest to the text, and the text itself. Its `attention` is only a layer."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.0):
        super().__init__()
        self.attention = nn.Linear(dim, dim)

    def forward(self, text, frames):
        best = (text[:, None, None] * frames).sum(-1).argmax(dim=-1)  # (texts, videos)
        chosen = frames[torch.arange(len(frames)), best]
        return self.attention(chosen) + text[:, None]


class OddXPool(XPool):
    """A subclass of XPool that pools in another way."""

    def forward(self, text, frames):
        return super().forward(text.roll(1, -1), frames) - 2 * frames[:, 0]


@pytest.fixture
def toys(monkeypatch) -> None:
    """Registers both as --fusion last and --fusion odd."""
    monkeypatch.setitem(model_file.FUSIONS, "last", LastFrame)
    monkeypatch.setitem(model_file.FUSIONS, "odd", OddXPool)


# ---- rows


@pytest.fixture
def library(tmp_path) -> Library:
    """A library of two files: "a" has three clips, "b" one."""
    made = Library(str(tmp_path / "library.db"), create=True)
    made.describe({**ABOUT, "folder": str(tmp_path)})
    return fill(made)


def fill(made: Library) -> Library:
    """Adds the two files."""
    made.begin(["a", "b"], {})
    for file, count in (("a", 3), ("b", 1)):
        ids = [(f"{made.key(file)}-{n}", float(n), n + 1.0 if n < count - 1 else None) for n in range(count)]
        frames = randn(count, FRAMES, DIM, seed=count)
        made.add(ids, frames.mean(dim=1), frames, [f"{file}{n}".encode() for n in range(count)])
        made.finish({file: {"stamp": "stamp", "clips": count, "error": None}})
    return made


def test_a_library_returns_the_rows_that_were_added(library):
    assert len(library) == 4
    rows, frames = library.clips_of("a")
    assert [(row["start"], row["end"]) for row in rows] == [(0, 1), (1, 2), (2, None)]
    assert torch.equal(frames, randn(3, FRAMES, DIM, seed=3).half().float())
    ids = [row["id"] for row in rows]
    assert library.names(ids) == ["a"] * 3
    assert library.thumbnails(ids) == {id: f"a{n}".encode() for n, id in enumerate(ids)}
    row, own = library.clip(ids[1])
    assert row == rows[1] and torch.equal(own, frames[1:2]) and library.clip("0" * 24 + "-0") is None
    assert contents(library) == contents(opened_again(library))


def opened_again(library: Library) -> Library:
    """As another process opens it."""
    return Library(library.where, features=library.home if library.server else None)


def test_a_shortlist_holds_the_largest_cosines_first(library):
    text = randn(DIM)
    rows, frames = (list(column) for column in zip(*library.batches()))
    ids = [row["id"] for row in rows[0]]
    cosines = torch.nn.functional.cosine_similarity(frames[0].mean(dim=1), text, dim=-1)
    expected = [ids[n] for n in cosines.argsort(descending=True)]
    for count in (1, 3, 4, 9):
        near, features = library.nearest(text, count)
        assert [row["id"] for row in near] == library.nearest_ids(text, count) == expected[:count]
        assert torch.equal(features, frames[0][[ids.index(row["id"]) for row in near]])


def test_a_file_is_unfinished_until_it_is_written_and_loses_its_clips_when_it_is_read_again(library):
    finished = {"stamp": "stamp", "clips": 1, "error": None}
    assert library.files()["b"] == finished
    library.begin(["b", "new"], library.files())
    unfinished = {"stamp": "", "clips": 0, "error": None, "mount": None}
    assert library.files() == {"a": {**finished, "clips": 3}, "b": unfinished, "new": unfinished}
    assert len(library) == 3 and library.clips_of("b")[0] == []
    library.drop(["a"])
    assert {*library.files()} == {"b", "new"} and len(library) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])  # 1e5 is infinite in half precision
@pytest.mark.parametrize("where", ["frames", "vectors"])
def test_features_that_are_not_finite_are_refused_and_nothing_is_written(library, value, where):
    frames, before = randn(1, FRAMES, DIM), contents(library)
    vectors = frames.mean(dim=1)
    {"frames": frames, "vectors": vectors}[where].view(-1)[3] = value
    if where == "vectors" and value == 1e5:
        return library.add([("x-0", 0.0, None)], vectors, frames, [b""])  # vectors have full precision
    assert "not finite" in sentence(library.add, [("x-0", 0.0, None)], vectors, frames, [b""])
    assert contents(library) == before


def test_a_file_that_is_finished_again_without_clips_keeps_those_it_has(library):
    before = contents(library)
    library.close()
    other = opened_again(library)
    other.finish({"a": {"stamp": "new", "clips": 3, "error": None}})
    assert contents(other) == contents(library) == before and library.files()["a"]["stamp"] == "new"


def test_a_library_of_several_shards_holds_what_that_of_one_holds(library, tmp_path, monkeypatch):
    other = Library(str(tmp_path / "other.db"), create=True)
    other.describe(library.about)
    fill(other)
    for made, rows in ((library, 100), (other, 2)):
        monkeypatch.setattr("engine.library.ROWS", rows)
        for n in range(3):
            frames = randn(2, FRAMES, DIM, seed=10 + n)
            made.begin([f"c{n}"], {})
            for k in range(2):  # a file whose clips come in two batches stays in one shard
                id = (f"{made.key(f'c{n}')}-{k}", float(k), None)
                made.add([id], frames[k : k + 1].mean(dim=1), frames[k : k + 1], [b"strip"])
            made.finish({f"c{n}": {"stamp": "stamp", "clips": 2, "error": None}})
    assert contents(other) == contents(library) == contents(opened_again(other)) and len(other) == 10
    assert (len(library.state.shards), len(other.state.shards)) == (1, 4)


def test_a_library_whose_creation_was_stopped_is_created_anew(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Library(str(tmp_path / "x.db"), create=True).describe(ABOUT)
    (tmp_path / "x.db" / "about.json.host.1.part").touch()  # as kill -9 leaves it
    assert "holds no library" in sentence(Library, str(tmp_path / "x.db"))
    library, frames = Library(str(tmp_path / "x.db"), create=True), randn(2, FRAMES, DIM)
    library.describe(ABOUT)
    key = library.key("x")
    library.add([(f"{key}-0", 0.0, None), (f"{key}-1", 1.0, None)], frames.mean(dim=1), frames, [b"", b""])
    library.finish({"x": {"stamp": "", "clips": 2, "error": None}})
    assert library.nearest_ids(frames[1].mean(dim=0), 1) == [f"{key}-1"] and len(library) == 2


def test_the_row_of_a_file_that_another_process_removed_is_no_file(library):
    (row,) = library.file_rows([f"{library.key('gone')}-0"])
    assert row["stamp"] == "" and not library.path(row["file"]).exists()


def test_a_name_in_the_library_that_leads_out_of_the_folder_is_refused(library, tmp_path):
    assert library.path("deep/a.mp4") == tmp_path / "deep" / "a.mp4"
    for name in ("../secret.txt", "/etc/passwd", "deep/../../secret.txt"):
        assert "is not a name below" in sentence(library.path, name)


def test_a_filmstrip_fits_a_row_of_the_library_whatever_the_frames():
    noise = np.random.default_rng(0).integers(256, size=(16, 90, 300, 3), dtype=np.uint8)
    for frames in (noise, noise[:, :1], noise[:, :, :1]):
        assert len(filmstrip([*frames])) <= 48_000 and len(filmstrip([*frames], most=9000)) <= 9000


def test_spans_are_printed_in_seconds():
    assert [span(0.0, None), span(0.0, 10.0), span(2.25, 3.5), span(7.0, None)] == [
        "whole file", "0-10 s", "2.2-3.5 s", "7 s-end",
    ]  # fmt: skip


def test_the_stamp_of_a_file_changes_with_its_bytes_and_with_how_it_is_cut(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    stamps = [stamp(path, "whole"), stamp(path, "window 10")]
    path.write_bytes(b"three")
    assert len({*stamps, stamp(path, "whole")}) == 3


# ---- the model's part: identity and vectors


def test_the_identity_of_a_model_is_that_which_older_libraries_hold():
    model = random_model(frames=FRAMES, radius="joint")
    for number, (_, value) in enumerate(sorted(model.state_dict().items())):
        value.fill_(number)
    assert identity(model) == "0d0c1fc701e552cb-4"  # computed before the code was divided into engine/
    assert identity(random_model(frames=FRAMES)) != identity(random_model(frames=FRAMES, seed=1))


def test_the_vector_of_a_clip_is_v_where_attention_is_even():
    model, frames = random_model(frames=FRAMES), randn(3, 1, DIM).expand(-1, FRAMES, -1)
    v = model.fusion(randn(2, DIM, seed=1), frames)  # with equal frames, any attention gives the same v
    assert torch.allclose(overall(model, frames), nn.functional.normalize(v[0], dim=-1), atol=1e-5)


def test_the_vector_of_a_clip_is_the_mean_of_its_unit_frames_under_mean_pooling():
    for radius in ("none", "linear"):
        model, frames = random_model(frames=FRAMES, fusion="mean", radius=radius), randn(3, FRAMES, DIM)
        assert type(model.fusion) is MeanPool
        mean = nn.functional.normalize(frames, dim=-1).mean(dim=1)
        assert torch.allclose(overall(model, frames), nn.functional.normalize(mean, dim=-1), atol=1e-6)


@pytest.mark.parametrize("fusion", ["last", "odd"])
def test_the_vector_of_a_clip_under_an_unknown_psi_is_v_for_its_mean_frame(fusion, toys):
    model, frames = random_model(frames=FRAMES, fusion=fusion), randn(3, FRAMES, DIM)
    own = [model.fusion(one.mean(dim=0)[None], one[None])[0, 0] for one in frames]
    expected = nn.functional.normalize(torch.stack(own), dim=-1)
    assert torch.allclose(overall(model, frames), expected, atol=1e-5)
    for k in range(3):  # no clip depends on its neighbours
        assert torch.allclose(overall(model, frames[k : k + 1])[0], expected[k], atol=1e-5)


# ---- errors


def test_a_library_that_is_missing_or_misnamed_gives_one_sentence(tmp_path):
    assert "not found: create it" in sentence(Library, str(tmp_path / "none.db"))
    assert "ends in .db" in sentence(Library, str(tmp_path / "none.sqlite"))
    assert "no Milvus server answers" in sentence(Library, "http://127.0.0.1:1")
    assert Library(str(tmp_path / "deep" / "empty.db"), create=True).about == {}
    assert "holds no library" in sentence(Library, str(tmp_path / "deep" / "empty.db"))


def test_a_library_is_a_folder_also_with_a_slash_at_its_end(library, tmp_path):
    assert (tmp_path / "library.db").is_dir() and len(Library(f"{library.where}/")) == 4


def test_a_place_where_no_library_can_be_gives_its_own_sentence(tmp_path):
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "old.db").write_bytes(b"SQLite format 3")
    (tmp_path / "lite.db" / "collections").mkdir(parents=True)
    (tmp_path / "photos.db").mkdir()
    (tmp_path / "photos.db" / "a.jpg").touch()
    places = [
        ("clip.mp4/x.db", "clip.mp4 is not a folder"),
        ("old.db", "was made by an older version"),
        ("lite.db", "was made by an older version"),
    ]
    places += [("photos.db", "is a folder that holds no library"), ("n" * 300 + ".db", "File name too long")]
    for name, reason in places:
        message = sentence(Library, str(tmp_path / name), create=True)
        assert name in message and reason in message and "name another one with --library" in message
    if Path("/proc").is_dir():
        assert "/proc/nothere" in sentence(Library, "/proc/nothere/x.db", create=True)
    for name in ("photos.db",):  # without create
        assert "create it with" in sentence(Library, str(tmp_path / name))
    assert [path.name for path in (tmp_path / "photos.db").iterdir()] == ["a.jpg"]


def test_a_damaged_library_gives_one_sentence(library, tmp_path):
    for number, (name, damage) in enumerate(
        [("*.journal", b"{}\n"), ("*.frames", b""), ("about.json", b"{")]
    ):
        copy = tmp_path / f"{number}.db"
        shutil.copytree(library.where, copy)
        for path in copy.glob(name):
            path.write_bytes(path.read_bytes() + damage if name == "*.journal" else damage)
        assert "damaged" in sentence(lambda copy=copy: len(Library(str(copy))))


def test_a_local_library_needs_no_network(library, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    assert len(Library(library.where)) == len(library) > 0


def test_a_library_without_the_right_to_write_is_read(library):
    before = contents(library)
    for path in (Path(library.where), *Path(library.where).iterdir()):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    assert contents(Library(library.where)) == before
    Path(library.where).chmod(0o700)


def test_a_server_needs_the_folder_of_the_features_and_a_local_library_has_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr("engine.library.Milvus", lambda where: None)
    assert "--features belongs to a Milvus server" in sentence(
        Library, str(tmp_path / "x.db"), True, tmp_path
    )


@pytest.mark.parametrize("where", ["http://[bad", "http://host:port", "ftp://host", "http://127.0.0.1:1"])
def test_an_address_of_no_server_gives_one_sentence(where):
    assert f"{where} cannot be opened: no Milvus server answers there (" in sentence(Library, where)


def test_without_milvus_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    assert "pip install -r requirements-search.txt" in sentence(Library, "http://127.0.0.1:1")
    assert Library(str(tmp_path / "x.db"), create=True).about == {}  # a local library needs none
