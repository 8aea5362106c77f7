"""Shards: what was committed is read, whatever happens to the process that writes, and nothing else is."""

import inspect
import itertools
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from engine import shards
from engine.files import DataError
from engine.shards import Shards, Writer, record

SIZES = 'FRAMES, DIM = 3, 5; HOLDS = {"model": "none", "dim": DIM, "frames": FRAMES}'
FRAMES, DIM = 3, 5
HOLDS = {"model": "none", "dim": DIM, "frames": FRAMES}


def clips_of(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    rng = np.random.default_rng([seed, count])
    clips = np.zeros(count, record(DIM, FRAMES))
    clips["n"], clips["start"], clips["end"] = range(count), range(count), -1
    clips["vector"], clips["scale"] = rng.random((count, DIM)), rng.random((count, FRAMES))
    frames = rng.random((count, FRAMES, DIM)).astype(np.float16)
    return clips, frames, [b"strip %d-%d" % (seed, n) * n for n in range(count)]


def put(writer: Writer, file: str, count: int, seed: int, time: int) -> None:
    """Commits a file of some clips, which depend on the seed alone."""
    spans = [writer.add(*clips_of(seed, count))] if count else []
    writer.commit({file: (time, {"clips": count, "seed": seed}, spans)})


def held(folder) -> dict[str, tuple]:
    """The row and the clips of each file: all that a reader sees."""
    state, found = Shards(folder).state(), {}
    for file, ((_, row, _), _) in state.files.items():
        if row is None:
            continue
        clips = []
        for _, shard, rows in state.places(state.of_file(file)):
            for r in rows.tolist():
                clips.append((shard.clips[r][["n", "start"]].tolist(), shard.frames[r].tobytes()))
                clips[-1] += (shard.clips["vector"][r].tobytes(), shard.strip(r))
        found[file] = row["seed"], clips
    assert len(state) == sum(len(clips) for _, clips in found.values())
    return found


def expected(**files: tuple[int, int]) -> dict[str, tuple]:
    """What `held` returns for files of (count, seed)."""
    found = {}
    for file, (count, seed) in files.items():
        clips, frames, strips = clips_of(seed, count)
        parts = zip(clips, frames, strips)
        own = [((n, n), f.tobytes(), c["vector"].tobytes(), s) for n, (c, f, s) in enumerate(parts)]
        found[file] = seed, own
    return found


def test_what_was_committed_is_read_and_the_latest_entry_of_a_file_counts(tmp_path):
    first, second = Writer(tmp_path, HOLDS), Writer(tmp_path, HOLDS)  # two processes at once
    put(second, "a", 2, seed=5, time=30)
    put(first, "a", 3, seed=1, time=10)
    put(first, "b", 1, seed=2, time=20)
    first.add(*clips_of(9, 4))  # not committed
    put(second, "c", 0, seed=3, time=40)
    second.commit({"b": (50, None, [])})
    assert held(tmp_path) == expected(a=(2, 5), c=(0, 3))
    put(first, "b", 2, seed=4, time=60)
    assert held(tmp_path) == expected(a=(2, 5), b=(2, 4), c=(0, 3))


def test_a_reader_follows_what_others_commit(tmp_path):
    reader, writer = Shards(tmp_path), Writer(tmp_path, HOLDS)
    assert len(reader.state()) == 0
    put(writer, "a", 2, seed=1, time=1)
    before = reader.state()
    put(writer, "b", 3, seed=2, time=2)
    assert (len(before), len(reader.state())) == (2, 5) and reader.state() is reader.state()
    assert [len(piece) for piece, _ in reader.state().pieces(2)] == [2, 2, 1]


def test_a_journal_that_ends_anywhere_holds_the_commits_before(tmp_path):
    writer = Writer(tmp_path, HOLDS)
    sizes, states = [writer.size()], [{}]
    for n, count in enumerate((2, 1, 3)):
        put(writer, f"f{n % 2}", count, seed=n, time=n + 1)
        sizes.append(writer.size())
        states.append(held(tmp_path))
    (journal,) = tmp_path.glob("*.journal")
    whole = journal.read_bytes()
    for size in range(len(whole) + 1):
        journal.write_bytes(whole[:size])
        assert held(tmp_path) == states[sum(s <= size for s in sizes[1:])]


def test_kill_9_at_any_time_loses_nothing_that_was_committed(tmp_path):
    code = f"import itertools, pathlib, sys, numpy as np\nfrom engine.shards import Writer, record\n{SIZES}\n"
    code += f"{inspect.getsource(clips_of)}\n{inspect.getsource(put)}\n"
    code += f"""if True:
        writer = Writer(pathlib.Path({str(tmp_path)!r}), HOLDS)
        for n in itertools.count():
            put(writer, f"{{sys.argv[1]}}-{{n}}", 1 + n % 3, n, n + 1)
            print(n, flush=True)"""
    for trial in range(3):
        command = [sys.executable, "-c", code, str(trial)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        said = list(itertools.islice(process.stdout, 5 + 7 * trial))
        process.send_signal(signal.SIGKILL)
        last = int([*said, *process.stdout.read().split("\n")[:-1]][-1])
        process.wait()
        found = held(tmp_path)
        files = {f"{trial}-{n}": (1 + n % 3, n) for n in range(last + 1)}
        assert expected(**files).items() <= found.items() and f"{trial}-{last + 2}" not in found
    Shards(tmp_path).merge()
    assert found == held(tmp_path)


def test_merging_keeps_what_is_found_and_removes_the_bytes_of_the_rest(tmp_path):
    for n in range(3):  # of the first shard, two of three clips are removed; of the second, one of two
        writer = Writer(tmp_path, HOLDS)
        put(writer, f"a{n}", 1, seed=n, time=1)
        put(writer, f"b{n}", 2 - (n > 0), seed=n, time=1)
        writer.close()
    writer = Writer(tmp_path, HOLDS)
    writer.commit({"b0": (2, None, []), "b1": (2, None, [])})
    kept, reader = held(tmp_path), Shards(tmp_path)
    state = reader.state()
    old = {path.name: path.stat().st_size for path in tmp_path.glob("*.frames")}
    Shards(tmp_path).merge()
    new = {path.name: path.stat().st_size for path in tmp_path.glob("*.frames")}
    assert held(tmp_path) == kept and len(reader.state()) == 4
    assert sum(new.values()) == sum(old.values()) - 2 * FRAMES * DIM * 2 and len(old.keys() & new.keys()) == 3
    assert state.shards[0].frames.shape == (3, FRAMES, DIM) and state.shards[0].strip(2) == b"strip 0-1"


def test_many_small_shards_become_one_but_for_those_that_are_written_to(tmp_path):
    writers = [Writer(tmp_path, HOLDS) for _ in range(shards.MANY + 3)]
    for n, writer in enumerate(writers):
        put(writer, f"f{n % 17}", 1, seed=n, time=n)
        if n > 1:
            writer.close()
    kept = held(tmp_path)
    Shards(tmp_path).merge()
    assert held(tmp_path) == kept and len([*tmp_path.glob("*.journal")]) == 3
    put(writers[0], "new", 1, seed=99, time=99)
    assert held(tmp_path) == kept | expected(new=(1, 99))


def test_a_merge_that_was_killed_before_it_deleted_the_old_shards_changes_nothing(tmp_path, monkeypatch):
    for n in range(shards.MANY + 1):
        writer = Writer(tmp_path, HOLDS)
        put(writer, f"f{n}", 1, seed=n, time=n)
        writer.close()
    kept = held(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_delete", lambda journal: None)
        Shards(tmp_path).merge()
    assert held(tmp_path) == kept
    next(tmp_path.glob("*.journal")).unlink()  # killed while it deletes
    assert held(tmp_path) == kept
    Shards(tmp_path).merge()
    assert held(tmp_path) == kept and len([*tmp_path.iterdir()]) == 4


def test_a_new_entry_counts_also_if_an_older_one_has_a_time_in_the_future(tmp_path):
    writer = Writer(tmp_path, HOLDS)
    put(writer, "a", 1, seed=1, time=2**62)
    put(writer, "a", 2, seed=2, time=Shards(tmp_path).state().now())
    assert held(tmp_path) == expected(a=(2, 2))


@pytest.mark.parametrize("kind", ["clips", "frames", "strips"])
def test_a_shard_whose_file_is_too_short_gives_one_sentence(kind, tmp_path):
    writer = Writer(tmp_path, HOLDS)
    put(writer, "a", 3, seed=1, time=1)
    (path,) = tmp_path.glob(f"*.{kind}")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match="is damaged"):
        held(tmp_path)


def test_shards_of_two_models_are_refused(tmp_path):
    for model in ("one", "two"):
        put(Writer(tmp_path, {**HOLDS, "model": model}), model, 1, seed=1, time=1)
    with pytest.raises(DataError, match="several models"):
        held(tmp_path)


def test_a_full_disk_gives_one_sentence_and_what_was_committed_stays(tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    writer = Writer(tmp_path, HOLDS)
    put(writer, "a", 2, seed=1, time=1)
    with open("/dev/full", "wb", 0) as full:
        monkeypatch.setitem(writer._files, "frames", full)
        with pytest.raises(DataError, match="No space left"):
            writer.add(*clips_of(2, 1))
    assert held(tmp_path) == expected(a=(2, 1))
    shutil.rmtree(tmp_path)
