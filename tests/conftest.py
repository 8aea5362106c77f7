"""A small world for the tests: random CLIPs of OpenAI's class, a few built-in clips as files."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch

import shapes
from engine.backbone import import_clip
from engine.config import METHODS
from engine.datasets import read_csv
from engine.files import DataError
from model import TMASS

ROOT = Path(__file__).parent.parent
REALDATA = Path(os.environ.get("TMASS_REALDATA", ROOT.parent / "shared" / "realdata"))

# A shell's background jobs ignore SIGINT, and so do their children. The tests that send it need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def realdata() -> Path:
    if not REALDATA.is_dir():
        pytest.skip(f"no real clips at {REALDATA} (set TMASS_REALDATA)")
    return REALDATA


@pytest.fixture(autouse=True)
def empty_pictures(request, monkeypatch):
    """The pictures of runs and results are empty files: to draw them takes half the time of a short run."""
    if not request.node.get_closest_marker("pictures"):
        for name in ("engine.experiment.plot_losses", "evaluate.rank_histogram", "evaluate.contact_sheet"):
            monkeypatch.setattr(name, lambda path, *_, **__: Path(path).touch())


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same in every test."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_clip(trunk: str = "resnet", seed: int = 0) -> torch.nn.Module:
    """A random CLIP of OpenAI's class, small enough for a test. All its sizes differ."""
    torch.manual_seed(seed)
    vision = dict(image_resolution=32, vision_layers=(1, 1, 1, 1), vision_width=4, vision_patch_size=None)
    if trunk == "vit":
        vision = dict(image_resolution=32, vision_layers=2, vision_width=64, vision_patch_size=16)
    text = dict(
        context_length=20, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=1
    )
    return import_clip().model.CLIP(embed_dim=24, **vision, **text).float().eval()


def random_model(
    method: str = "tmass", seed: int = 0, frames: int = 4, fusion: str = "", radius: str = "", **options
) -> TMASS:
    """A model of random parameters: a wrong term cannot hide behind an identity, a one or a zero."""
    own = METHODS[method]
    model = TMASS(small_clip(seed=seed), fusion or own[0], radius or own[1], frames, **options)
    generator = torch.Generator().manual_seed(seed)
    for part in (model.fusion, model.radius):
        for parameter in part.parameters() if part is not None else ():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory) -> Path:
    """clips.csv and clips/ of a built-in data set of 24 clips: 16 train, 4 val, 4 test."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    (folder / "clips").mkdir(parents=True)
    shapes._render_clips((folder / "clips", 0, range(24)))
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "caption", "split"])
        for number in range(24):
            split = "train" if number < 16 else "val" if number < 20 else "test"
            writer.writerows(
                [f"clip{number:05d}.mp4", caption.text, split]
                for caption in shapes.make_clip(0, number).captions
            )
    return folder


@pytest.fixture(scope="session")
def clips(clips_folder):
    return read_csv(clips_folder / "clips.csv", clips_folder / "clips")


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Random weights of a small CLIP: `--arch tiny --weights FILE` needs no pretraining."""
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(small_clip().state_dict(), path)
    return path


def message(function, *arguments) -> str:
    """The sentence of the DataError that a call raises."""
    with pytest.raises(DataError) as error:
        function(*arguments)
    return str(error.value)
