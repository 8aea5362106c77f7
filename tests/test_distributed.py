"""Training by several processes: two gloo ranks on the CPU do what one process does."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_clip
from processes import ranks
from torch.utils.data import DataLoader

import train
from engine import distributed
from engine.config import RECIPES, Config
from engine.experiment import read_log
from engine.files import DataError, ModelError
from engine.optim import TrainState, train_mode
from engine.weights import load_file
from model import TMASS


@pytest.fixture
def flags(clips_folder, tmp_path) -> list[str]:
    """Seven pairs a batch: the two processes have three and four of them. Four validation clips."""
    torch.save(small_clip("vit").state_dict(), tmp_path / "vit.pt")
    values = {
        "--dataset": "csv", "--annotations": clips_folder / "clips.csv", "--videos": clips_folder / "clips",
        "--data": tmp_path / "data", "--arch": "tiny", "--weights": tmp_path / "vit.pt", "--num-frames": 3,
        "--batch": 7, "--clip-lr": 3e-5, "--head-lr": 3e-5, "--max-steps": 3, "--device": "cpu",
    }  # fmt: skip
    return [str(x) for pair in values.items() for x in pair]


def test_two_processes_give_loss_gradients_and_weights_of_one(flags, tmp_path):
    """By micro-batches of three: the first process has one of them, the second two."""
    train.main([*flags, "--out", str(tmp_path / "one")])
    more = ["--micro-batch", "3", "--out", str(tmp_path / "two")]
    printed = ranks(2, train.main, [*flags, *more], folder=tmp_path)
    assert "".join(printed).count("validation:") == 1  # only rank 0 writes
    one, two = (load_file(tmp_path / name / "last.pt") for name in ("one", "two"))
    start, moved = load_file(tmp_path / "vit.pt"), 0.0
    for name, value in one["model"].items():
        assert torch.allclose(two["model"][name], value, rtol=0, atol=1e-5), name
        moved = max(moved, (value - start.get(name.removeprefix("clip."), value)).abs().max().item())
    assert moved > 4e-5  # weights move by much more than they differ
    # AdamW is nearly independent of the size of a gradient, so its running mean of gradients is compared too.
    means = [
        torch.cat([x["exp_avg"].flatten() for x in s["optimizer"]["state"].values()]) for s in (one, two)
    ]
    assert (means[0] - means[1]).norm() < 1e-5 * means[0].norm()
    rows = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    assert rows[1][0]["loss"] == pytest.approx(rows[0][0]["loss"], rel=1e-5)
    assert rows[1][1]["val"] == rows[0][1]["val"]


SIZES = dict(num_frames=3, batch=7, clip_lr=1e-5, head_lr=1e-5, augment=False)
PLAIN = dict(method="tmass", fusion="xpool", radius="linear", trunk="vit")
CASES = {
    "paper": {}, "best": RECIPES["best"], "every": dict(pairs="every"), "batch norm": dict(trunk="resnet"),
    "xpool": dict(method="xpool", radius="none"), "clip": dict(freeze="clip"), "micro": dict(micro_batch=2),
}  # fmt: skip


def two_steps(name: str, pairs: int = 7) -> tuple[float, dict, dict]:
    """Two steps on the same batch. Returns the last loss, the gradients and the weights."""
    options = {**PLAIN, **CASES[name]}
    model = TMASS(small_clip(options.pop("trunk")), options["fusion"], options["radius"], num_frames=3)
    config = Config(**SIZES, **options)
    torch.manual_seed(0)
    frozen = config.freeze != "none"
    images = torch.randint(0, 255, (pairs, 3, 3, 32, 32), dtype=torch.uint8)
    images = torch.randn(pairs, 3, 24) if frozen else images
    tokens = torch.randn(pairs, 24) if config.freeze == "clip" else torch.randint(1, 49000, (pairs, 20))
    if frozen:
        (model.clip if config.freeze == "clip" else model.clip.visual).requires_grad_(False)
        model.logit_scale.requires_grad_(True)
    train_mode(model, config)
    state = TrainState(model, config, total=10)
    encoder, own = distributed.wrap(train.Encoder(model, config)), distributed.shard(pairs)
    for _ in range(2):
        loss, _ = train.train_step(state, encoder, images[own], tokens[own], config, pairs)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), found, {n: x.clone() for n, x in model.state_dict().items()}


def save_steps(path: Path) -> None:
    """Takes the steps of every case, and saves what the second process has."""
    distributed.init_distributed("cpu")
    result = {name: two_steps(name) for name in CASES}
    if distributed.rank_and_world() == (1, 2):
        torch.save(result, path)


def test_every_recipe_has_the_gradients_of_one_process(tmp_path):
    """Seven pairs on two processes; also with frozen parts, and with BatchNorm, which stays as it is."""
    ranks(2, save_steps, tmp_path / "two.pt", folder=tmp_path)
    two = load_file(tmp_path / "two.pt")
    for name in CASES:
        (loss, gradients, weights), (same_loss, same_gradients, same_weights) = two_steps(name), two[name]
        assert loss == pytest.approx(same_loss, rel=1e-5) and gradients.keys() == same_gradients.keys(), name
        flat, same = (torch.cat([x.flatten() for x in g.values()]) for g in (gradients, same_gradients))
        assert flat.norm() > 0 and (flat - same).norm() < 1e-5 * flat.norm(), name
        for key, value in weights.items():
            assert torch.allclose(value, same_weights[key], rtol=0, atol=1e-5), (name, key)


# What the functions return on two ranks.
FUNCTIONS = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
import torch.distributed as dist
from engine import distributed
from engine.files import DataError

distributed.init_distributed("cpu")
rank, world = distributed.rank_and_world()
rows = torch.arange(5.0)[:, None] * torch.ones(2)
own = rows[distributed.shard(5)]
assert (rank, world, len(own)) == ((0, 2, 2), (1, 2, 3))[rank]
assert torch.equal(distributed.gather(own), rows) and torch.equal(distributed.gather_features(own, 5), rows)
assert distributed.gather(own[:0]).shape == (0, 2)
assert distributed.gather_objects({{rank: f"rank {{rank}}"}}) == {{0: "rank 0", 1: "rank 1"}}
assert distributed.from_rank_zero(lambda: rank) == 0
cpu = torch.device("cpu")
assert distributed.any_rank(rank == 1, cpu) and not distributed.any_rank(False, cpu)

def fail():
    raise DataError("nothing there")

try:
    distributed.from_rank_zero(fail)
except DataError as error:
    assert str(error) == "nothing there"
else:
    raise AssertionError("rank 0 failed, and this one did not")
with distributed.local_rank_zero_first():  # rank 1 finds the file of rank 0
    assert Path(sys.argv[1]).exists() == (rank == 1)
    Path(sys.argv[1]).touch()
import torch._dynamo  # as transformers does, after the start: it must not keep the group, and its threads
distributed.barrier()
dist.destroy_process_group()
if (tasks := Path("/proc/self/task")).exists():
    assert not [task for task in tasks.iterdir() if "gloo" in (task / "comm").read_text()]
Path(f"{{sys.argv[1]}}-{{rank}}").touch()  # a file, since two ranks print into one another's lines
"""


@pytest.mark.slow
def test_functions_on_two_ranks(tmp_path):
    script = tmp_path / "functions.py"
    script.write_text(FUNCTIONS.format(root=str(ROOT)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(script), str(tmp_path / "file")]
    started = []
    try:
        for rank in "01":
            own = {**common, "RANK": rank, "LOCAL_RANK": rank}
            with (tmp_path / f"errors-{rank}").open("w") as errors:
                started.append(subprocess.Popen(command, env=own, stderr=errors))
        codes = [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], [(tmp_path / f"errors-{rank}").read_text() for rank in "01"]
    assert (tmp_path / "file-0").exists() and (tmp_path / "file-1").exists()


def test_without_torchrun_there_is_one_process():
    x = torch.randn(3, 2)
    assert distributed.rank_and_world() == (0, 1) and distributed.shard(3) == slice(0, 3)
    assert distributed.gather(x) is x and distributed.gather_features(x, 3) is x
    assert distributed.gather_objects({"a": 1}) == {"a": 1} and distributed.from_rank_zero(lambda: 7) == 7
    assert distributed.any_rank(True, x.device) and not distributed.any_rank(False, x.device)
    module = torch.nn.Linear(2, 2)
    assert distributed.wrap(module) is module
    distributed.init_distributed("cpu")
    with distributed.local_rank_zero_first():
        distributed.barrier()


def test_more_processes_than_pairs_are_refused(flags, monkeypatch):
    monkeypatch.setattr(train.distributed, "rank_and_world", lambda: (0, 5))
    monkeypatch.setattr(train.distributed, "shard", lambda count: slice(0, count))
    says = "5 processes are more than the pairs of a batch or the validation clips: start fewer"
    with pytest.raises(SystemExit, match=says):
        train.main(flags)


def test_shards_of_all_processes_are_the_whole(monkeypatch):
    for world in (1, 2, 3, 5):
        shards = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank_and_world", lambda rank=rank, world=world: (rank, world))
            shards.append(list(range(7))[distributed.shard(7)])
        assert [thing for part in shards for thing in part] == list(range(7)) and all(shards)


# ---------------------------------------------------------------------------------------- devices, launchers


@pytest.mark.parametrize("name", [
    "tpu9", "mps", "xpu", "meta", "vulkan", "xla", "hpu", "mtia", "cuda:", "cuda:99", "", " ", "0",
])  # fmt: skip
def test_a_device_that_torch_cannot_compute_on_gives_one_sentence(name):
    if name in ("mps", "xpu") and getattr(torch, name).is_available():
        pytest.skip("this machine has one")
    says = rf"^--device {name}: torch cannot compute there \(.+\); choose auto, cpu"
    with pytest.raises(ModelError, match=says) as error:
        distributed.choose_device(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_auto_is_cuda_if_there_is_one_and_a_broken_one_is_named(monkeypatch):
    assert distributed.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def zeros(*_, device):
        assert device == torch.device("cuda")
        raise RuntimeError(
            "CUDA error: no kernel image is available\nCUDA kernel errors might be asynchronous"
        )

    monkeypatch.setattr(torch, "zeros", zeros)
    says = r"--device cuda: torch cannot compute there \(CUDA error: no kernel image .*\); choose auto, cpu"
    with pytest.raises(ModelError, match=says):
        distributed.choose_device("auto")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\na total capacity"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
])  # fmt: skip
def test_a_lack_of_memory_is_one_sentence_with_the_advice(error):
    says = r"^the memory of the device is too small \(.*allocate.*\): lower --batch\.$"
    with pytest.raises(ModelError, match=says), distributed.enough_memory("lower --batch"):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), distributed.enough_memory("lower --batch"):
        raise RuntimeError("a bug")


TORCHRUN = dict(WORLD_SIZE="3", RANK="2", LOCAL_RANK="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")


@pytest.fixture
def torchrun_variables(monkeypatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


def test_more_processes_than_gpus_are_refused(monkeypatch, torchrun_variables):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "auto"):
        with pytest.raises(ModelError, match="this machine has 2 GPUs and torchrun started more processes"):
            distributed.init_distributed(device)


@pytest.mark.parametrize("device", ["cuda:1", "mps", "xpu"])
def test_one_device_for_all_processes_is_refused(torchrun_variables, device):
    says = f"--device {device} is for one process: under torchrun choose cpu, or cuda, which gives each"
    with pytest.raises(ModelError, match=says):
        distributed.init_distributed(device)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_is_not_torchrun_is_refused(monkeypatch, torchrun_variables, name):
    """As Kubernetes' PyTorchJob, which sets no LOCAL_RANK, or a shell in which WORLD_SIZE is left over."""
    monkeypatch.delenv(name)
    says = f"WORLD_SIZE is set, but {name} is empty or not set: start .* by torchrun, or unset WORLD_SIZE"
    with pytest.raises(ModelError, match=says):
        distributed.init_distributed("cpu")


@pytest.mark.parametrize("name, value", [
    ("WORLD_SIZE", "many"), ("RANK", "first"), ("LOCAL_RANK", "x"), ("MASTER_PORT", "99999"), ("RANK", "7"),
])  # fmt: skip
def test_wrong_values_of_a_launcher_give_one_sentence(monkeypatch, torchrun_variables, name, value):
    monkeypatch.setenv("RANK", "0")  # the others wait for it
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ModelError, match=r"the processes could not be joined \(.+\): start .* torchrun"
    ) as error:
        distributed.init_distributed("cpu")
    assert "\n" not in str(error.value) and not torch.distributed.is_initialized()


def test_a_port_that_is_in_use_gives_one_sentence(monkeypatch, torchrun_variables):
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name, value in (("MASTER_PORT", server.getsockname()[1]), ("RANK", 0), ("WORLD_SIZE", 1)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ModelError, match=r"could not be joined \(.*(in use|EADDRINUSE)"):
            distributed.init_distributed("cpu")


# ---------------------------------------------------------------------------------- workers that load batches


class Killed(torch.utils.data.Dataset):
    """Its worker is killed, as by the kernel when memory is short, or by a write beyond /dev/shm."""

    def __init__(self, number: int):
        self.number = number

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), self.number)
        return index


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_worker_gives_one_sentence(number):
    with pytest.raises(
        DataError, match=r"a process that loads batches failed \(.+\): memory, .* --workers 0"
    ) as error:
        list(distributed.loaded(DataLoader(Killed(number), batch_size=None, num_workers=1)))
    assert "\n" not in str(error.value) and "--shm-size" in str(error.value)


class Signalled(torch.utils.data.Dataset):
    """Its process group gets SIGTERM and SIGINT while the second batch is loaded."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return index


def test_signals_for_all_processes_do_not_end_the_workers():
    """As Slurm, systemd and `timeout` send them: the process that trains ends its step, with its batches."""
    loader = DataLoader(
        Signalled(), batch_size=None, num_workers=1, worker_init_fn=distributed.ignore_signals
    )
    assert list(distributed.loaded(loader)) == [0, 1, 2]


class Failing(DataLoader):
    """A DataLoader that raises an error."""

    error: Exception

    def __iter__(self):
        yield 1
        raise self.error


SHM = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"


@pytest.mark.parametrize("error", [
    RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n  File\nRuntimeError: {SHM}"),
    OSError(28, "No space left on device"), OSError(30, "Read-only file system"), BlockingIOError(11, "busy"),
    RuntimeError("received 0 items of ancdata"), ConnectionResetError(104, "reset"), EOFError(),
])  # fmt: skip
def test_a_small_shared_memory_gives_one_sentence(error):
    loader = Failing([0], num_workers=2)
    loader.error = error
    batches = distributed.loaded(loader)
    assert next(batches) == 1
    with pytest.raises(
        DataError, match=r"\(/dev/shm\), is too small for 2 of them; use --workers 0"
    ) as found:
        next(batches)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("error", [
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nsizes of tensors must match"),
    OSError("Caught FileNotFoundError in DataLoader worker process 0.\nno such file"), RuntimeError("a bug"),
])  # fmt: skip
def test_other_errors_of_a_worker_are_not_hidden(error):
    loader = Failing([0], num_workers=2)
    loader.error = error
    with pytest.raises(type(error)) as found:
        list(distributed.loaded(loader))
    assert found.value is error


def test_an_error_without_workers_is_not_theirs():
    loader = Failing([0])
    loader.error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        list(distributed.loaded(loader))
