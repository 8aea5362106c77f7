"""Checkpoints: writing them, opening ours and those of the released code, and the state of a run to resume.

    file                  holds                                            written by
    best.pt, last.pt      {"model", "arguments", "config", ...}            save_checkpoint
    model.safetensors     the weights; config.json, README.md beside it    save_pretrained
    model_best.pth        {"epoch", "state_dict", "optimizer"}             the released T-MASS and X-Pool code

"model" is the state dict of TMASS, "arguments" are its arguments (with "activation" if CLIP has GELU),
"config" is the config it was trained with. A file loads strictly, all sizes are read from it, and no code in
it is run. A checksum reveals damage: torch stores one of each part of a .pt file, config.json has one of
itself and the weights. Old files have none.

    python -m engine.checkpoint save RUN FOLDER         # writes a run as save_pretrained does
    python -m engine.checkpoint push RUN USER/NAME      # sends that folder to the Hugging Face Hub"""

import argparse
import json
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import safetensors.torch
import torch
from torch import Tensor

from engine import backbone, hub, weights
from engine.backbone import activation_of, clip_sizes, laid_out, new_clip
from engine.config import METHODS, RANGES, Config, changes, label, plain, upgrade_config
from engine.files import ModelError, first_line, write_atomic, writing
from engine.weights import MISMATCH, load_file
from model import TMASS

NO_SPACE = "free some space there, or name another folder; an older file of this name is unchanged."
# What a checkpoint may record beside weights, arguments and config, for the card.
RECORDED = ("val", "step", "commit", "machine", "clips", "results", "license")


# ---------------------------------------------------------------------------------------------------- writing


def save_checkpoint(path: Path | str, model: TMASS, **more) -> None:
    """Writes a model, and `more` (plain values and tensors), atomically. Raises ModelError if it cannot."""
    content = {"model": model.state_dict(), "arguments": arguments_of(model), **more}
    with writing(Path(path), ModelError, NO_SPACE):
        write_atomic(Path(path), lambda file: torch.save(content, file))


def save_pretrained(model: TMASS, folder: Path | str, **more) -> None:
    """Writes model.safetensors, config.json and the card README.md: the layout of PyTorchModelHubMixin.

    config.json holds the arguments of TMASS and CLIP, and `more` (plain values). Of more["config"], the
    config of the training, paths are left out. A README.md without hub.MARK is kept. Raises ModelError if a
    file cannot be written."""
    folder, state = Path(folder), {name: x.contiguous() for name, x in model.state_dict().items()}
    stored, sizes = safetensors.torch.save(state), clip_sizes(model.clip.state_dict())
    config = {"config": hub.public_config(more["config"])} if "config" in more else {}
    content = {"model_type": "tmass", "arguments": arguments_of(model), "clip": sizes, **more, **config}
    content = json.loads(json.dumps(content))
    card = hub.model_card(content, label(model.arguments))
    content["checksum"] = checksum(content, [stored])
    files = {"model.safetensors": stored, "config.json": (json.dumps(content, indent=2) + "\n").encode()}
    if hub.may_replace(folder / "README.md"):
        files["README.md"] = card.encode()
    for name, data in files.items():  # the largest first: if the disk is full, the older files are unchanged
        with writing(folder / name, ModelError, NO_SPACE):
            write_atomic(folder / name, data)


def save_run(path: Path, folder: Path, license: str | None = None) -> dict | None:
    """Writes a run, or any checkpoint, as save_pretrained does, with all that its files recorded.

    license: of the weights, for the card. Returns the results in the card, None for "not evaluated". Raises
    ModelError."""
    file = find_file(path)
    content = read_checkpoint(file)
    model, config = build_from_checkpoint(content, file), config_of(content, file)
    more = {name: content[name] for name in RECORDED if content.get(name)} | hub.facts(file)
    more |= {"license": license} if license else {}
    card = file.with_name("README.md")  # an edited one goes with the model
    if file.name == "model.safetensors" and not hub.may_replace(card) and not (folder / card.name).exists():
        with writing(folder / card.name, ModelError, NO_SPACE):
            write_atomic(folder / card.name, card.read_bytes())
    save_pretrained(model, folder, config=config, **more)
    return more.get("results")


def push_to_hub(model: TMASS | Path, name: str, private: bool | None = None, **more) -> str:
    """Sends a model, or a run, to the Hugging Face Hub as user/name. Returns the address of the commit.

    more: what save_pretrained takes, or for a run save_run. Raises ModelError."""
    hub.check_name(name)
    with tempfile.TemporaryDirectory() as folder:
        write = save_run if isinstance(model, Path) else save_pretrained
        write(model, Path(folder), **more)
        return hub.send(Path(folder), name, private)


def arguments_of(model: TMASS) -> dict:
    """Returns the arguments of a model as files hold them, with the activation of its CLIP if it is GELU."""
    activation = activation_of(model.clip)
    return {**model.arguments, **({"activation": activation} if activation != "quick_gelu" else {})}


def checksum(config: dict, parts: Iterable[bytes]) -> str:
    """Returns the CRC-32 of a config, which JSON gave, and of the bytes of its weights: eight hex digits."""
    crc = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


# ---------------------------------------------------------------------------------------------------- opening


def open_checkpoint(path: Path) -> tuple[TMASS, dict, Path]:
    """Opens a run's folder (its best.pt), a folder of save_pretrained, or a file.

    Returns the model (on the CPU, in eval mode), the config it was trained with, and the file. A released
    checkpoint holds no config; {"released": True} is returned for it. Raises ModelError."""
    file = find_file(path)
    content = read_checkpoint(file)
    return build_from_checkpoint(content, file), config_of(content, file), file


def find_file(path: Path) -> Path:
    """Returns the checkpoint in a folder, or the file itself. Raises ModelError if there is none."""
    names = ("best.pt", "model.safetensors") if path.is_dir() else ("",)
    file = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not file.is_file():
        advice = "train first (python train.py), or name a run or checkpoint by --checkpoint"
        raise ModelError(f"{file} not found: {advice}.")
    return file


def config_of(content: dict, file: Path) -> dict:
    """Returns the config in a file's content; {"released": True} for a released one. Raises ModelError."""
    return {"released": True} if is_released(content) else recorded_config(content, file)


def latest_run(runs: Path = Path("runs")) -> Path:
    """Returns the folder below `runs` whose best.pt is the newest. Raises ModelError if there is none."""
    found = sorted(runs.glob("**/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        advice = "train first (python train.py), or name one by --checkpoint"
        raise ModelError(f"no checkpoint under {runs}/: {advice}.")
    return found[-1].parent


def load_checkpoint(path: Path | str) -> TMASS:
    """Returns the model in a file, on the CPU, in eval mode. Raises ModelError."""
    return build_from_checkpoint(read_checkpoint(path), path)


def from_pretrained(folder: Path | str, revision: str | None = None) -> TMASS:
    """Returns the model of a folder of save_pretrained, on the CPU, in eval mode.

    A string "user/name" that is no path here is a model on the Hugging Face Hub; revision: a branch, tag or
    commit of it. Raises ModelError."""
    if isinstance(folder, str) and hub.is_name(folder) and not Path(folder).exists():
        folder = hub.fetch(folder, revision)
    elif revision is not None:
        raise ModelError(f"{folder} has no revisions: leave out {revision!r}, or give user/name of the Hub.")
    return load_checkpoint(Path(folder) / "model.safetensors")


def read_checkpoint(path: Path | str) -> dict:
    """Returns the content of a file: {"model", "arguments", ...}, or a released one's. Raises ModelError."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return load_file(path)
    config = path.with_name("config.json")
    if not config.is_file():
        raise ModelError(f"{config} not found: it belongs beside {path.name} (save_pretrained writes both).")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        expected = content.pop("checksum", None)
        with path.open("rb") as file:  # a folder of an earlier version has no checksum
            damaged = expected and expected != checksum(content, iter(partial(file.read, 2**20), b""))
    except (ValueError, OSError, TypeError, AttributeError, RecursionError):
        damaged = True
    if damaged:
        advice = 'copy both again; if you changed config.json, remove its "checksum"'
        raise ModelError(f"{path} or its config.json is damaged: {advice}.")
    return {**content, "model": load_file(path)}


def build_from_checkpoint(content: dict, path: Path | str) -> TMASS:
    """Returns the model of a file's content, on the CPU, in eval mode. Raises ModelError, naming `path`."""
    try:
        if is_released(content):
            mark = f"clip.{weights.HUGGING_FACE_MARK}"
            content = from_released(weights.plain_names(content["state_dict"], mark))
        if missing := [name for name in ("model", "arguments") if not isinstance(content.get(name), dict)]:
            raise ValueError(f'it holds no dict "{missing[0]}"')
        arguments = upgrade(content)["arguments"]
        state = weights.plain_names(content["model"], "clip.ln_final.weight")
        weights.check_weights(state, path)
        names = {name: name.removeprefix("clip.") for name in state if name.startswith("clip.")}
        activation = arguments.pop("activation", "quick_gelu")
        clip = laid_out(new_clip({short: state[name] for name, short in names.items()}, activation))
        try:
            check_arguments(arguments)
            model = TMASS(clip, **arguments)
        except ValueError as error:  # an unknown psi or R: the sentence of model.py says what to do
            raise ModelError(f"{path} cannot be opened: {error}") from None
        model.load_state_dict(state)
    except ModelError:
        raise
    except MISMATCH as error:
        advice = "name a last.pt or best.pt of it, or a released checkpoint of T-MASS or X-Pool"
        raise ModelError(f"{path} is not a checkpoint of train.py ({first_line(error)}): {advice}.") from None
    return model.float().eval()


def check_arguments(arguments: dict) -> None:
    """Raises ValueError for a number of TMASS's arguments that its flag does not allow."""
    for name in ("num_frames", "heads", "dropout", "initial_radius"):
        if not allowed(name, arguments.get(name, 1)):
            raise ValueError(f"its {name} is {arguments[name]!r:.40}; name another file.")


def recorded_config(content: dict, path: Path) -> dict:
    """Returns the config in a checkpoint, {} if it holds none. Raises ModelError for one that is none."""
    config = content.get("config", {})
    wrong = [] if isinstance(config, dict) else [f"a {type(config).__name__}, not a dict"]
    for name, value in () if wrong else config.items():
        if not isinstance(name, str) or (value is not None and not allowed(name, value)):
            wrong.append(f"{name!s:.40} is {value!r:.40}")
    if wrong:
        what = f"{path} holds a config that train.py does not write ({wrong[0]})"
        raise ModelError(f"{what}: name another checkpoint.")
    return upgrade_config(config)


def allowed(name: str, value: object) -> bool:
    """Whether a flag of train.py can have a value. Of other names, any string or number."""
    kind = Config.__annotations__.get(name)
    if name in RANGES:
        low, high = RANGES[name]
        return isinstance(value, int if kind in (int, int | None) else int | float) and low <= value <= high
    if name in ("method", "prior"):
        return value in get_args(kind)
    return isinstance(value, str | int | float if kind in (None, bool) else str)


def upgrade(content: dict) -> dict:
    """Returns the content of a checkpoint with the arguments that TMASS takes today.

    Older checkpoints name a method ("clip", "xpool", "tmass") in the place of psi, and always a radius."""
    arguments = dict(content["arguments"])
    if "method" in arguments:
        arguments["fusion"], radius = METHODS[arguments.pop("method")]
        arguments["radius"] = "none" if radius == "none" else arguments.get("radius", radius)
    return {**content, "arguments": arguments}


# --------------------------------------------------------------------------------------- released checkpoints


def is_released(content: dict) -> bool:
    """Whether a file has the layout of the released code: {"epoch", "state_dict", "optimizer"}."""
    return isinstance(content.get("state_dict"), dict) and "model" not in content


# Names in released checkpoints and here; those of CLIP are Hugging Face's. Replaced in this order.
RELEASED = {
    "pool_frames.cross_attn.q_proj": "fusion.query",
    "pool_frames.cross_attn.k_proj": "fusion.key",
    "pool_frames.cross_attn.v_proj": "fusion.value",
    "pool_frames.cross_attn.out_proj": "fusion.out",
    "pool_frames.linear_proj": "fusion.linear",
    "pool_frames.layer_norm": "fusion.norm",
    "stochastic.std_branch.linear_proj": "radius.linear",
}


def from_released(state: dict[str, Tensor]) -> dict:
    """Returns {"model", "arguments"} for the state_dict of a released T-MASS or X-Pool checkpoint.

        released                             here
        clip.text_model, clip.vision_model   clip, with OpenAI's names: q, k and v of a layer in one in_proj
        clip.{text,visual}_projection        clip.text_projection, clip.visual.proj (transposed)
        pool_frames                          fusion, with one head (the default; the shapes do not tell)
        stochastic.std_branch.linear_proj    radius: R = exp(linear(S)), weight (dim, frames)

    Left out: position_ids, which are constants, and learnable_scalar, which the released code never uses.
    Without `stochastic` the file is X-Pool's, with 12 frames (the default). The file does not tell the noise
    of training: U(0, 1) by default, N(0, 0.003^2) for LSMDC. Raises KeyError for other models."""
    clip = {name.removeprefix("clip."): x for name, x in state.items() if name.startswith("clip.")}
    names = {f"clip.{name}": value for name, value in weights.from_hugging_face(clip).items()}
    for name, value in state.items():
        new = name
        for released, ours in RELEASED.items():
            new = new.replace(released, ours)
        if not name.startswith("clip.") and not name.endswith(".learnable_scalar"):
            names[new] = value
    if "fusion.query.weight" not in names:
        raise KeyError("neither T-MASS nor X-Pool: no pool_frames in it")
    mass = any(name.startswith("stochastic.") for name in state)
    frames = names["radius.linear.weight"].shape[1] if mass else 12
    arguments = dict(fusion="xpool", radius="linear" if mass else "none", num_frames=frames)
    return {"model": names, "arguments": arguments}


# ----------------------------------------------------------------------------------------------------- resume


OTHER_TINY = f"was trained from another tiny CLIP than {backbone.TINY_FILE.name}, such as that of version 0.1"


def to_record(config: Config) -> dict:
    """The config as checkpoints hold it: plain values, and for the tiny CLIP which one it was."""
    tiny = {"tiny_clip": backbone.tiny_mark()} if config.arch == "tiny" and config.weights is None else {}
    return {**plain(config), **tiny}


def other_tiny_clip(config: dict) -> bool:
    """Whether a recorded config started from a tiny CLIP that is not the one in TINY_FILE."""
    tiny = config.get("arch") == "tiny" and config.get("weights") is None
    return tiny and config.get("tiny_clip") != backbone.tiny_mark()


def load_state(path: Path, config: Config, fingerprint: str) -> dict:
    """Returns the content of last.pt, to resume from. Raises ModelError if flags or data have changed.

    fingerprint: a hash of the training and validation clips. Flags in engine.config.FREE may differ."""
    state = load_file(path)
    if not all(isinstance(state.get(name), dict) for name in ("model", "optimizer")) or "config" not in state:
        raise ModelError(f"{path} is not a last.pt of train.py: nothing to resume from; name another --out.")
    weights.check_weights(state["model"], path)
    recorded = recorded_config(state, path)
    if other_tiny_clip(recorded):
        raise ModelError(f"{path} {OTHER_TINY}: remove the run, or name another --out.")
    changed, recipe = changes(config, recorded), recorded.get("recipe", "paper")
    if changed and recipe != config.recipe:
        changed = [f"--recipe {recipe}, not {config.recipe}"]
    advice = "or name another --out"
    if changed:
        what = f"was made with another config ({', '.join(changed)})"
        raise ModelError(f"{path} {what}: resume with the same flags, {advice}.")
    if state.get("data") != fingerprint:
        what = "was trained on other clips or captions"
        raise ModelError(f"{path} {what}: resume with the same data, {advice}.")
    return state


# ----------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Anything wrong with the input ends it with one sentence and exit code 1."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("action", choices=("save", "push"))
    parser.add_argument("run", type=Path, help="a run of train.py, a checkpoint, or a folder of `save`")
    parser.add_argument("target", help="save: a folder; push: USER/NAME")
    parser.add_argument("--license", help="of the weights; default: mit if its CLIP is, else unknown")
    parser.add_argument("--private", action="store_true", default=None, help="push: create it as private")
    given = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
            if given.action == "push":
                print(push_to_hub(given.run, given.target, given.private, license=given.license))
            else:
                results = save_run(given.run, Path(given.target), given.license)
                what = f"results: {results['name']}" if results else "not evaluated"
                print(f"written: {given.target} ({what})")
    except ModelError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
