"""Checkpoints: writing them, opening ours and those of the released code, and the state of a run to resume.

    file                  holds                                            written by
    best.pt, last.pt      {"model", "arguments", "config", ...}            save_checkpoint
    model.safetensors     the weights; config.json beside it: the rest     save_pretrained
    model_best.pth        {"epoch", "state_dict", "optimizer"}             the released T-MASS and X-Pool code

"model" is the state dict of TMASS, "arguments" are its arguments, "config" is the config it was trained with.
A file loads strictly, all sizes are read from it, and no code in it is run."""

import json
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from engine.backbone import MISMATCH, clip_sizes, first_line, import_clip, load_file, with_movable_mask
from engine.config import METHODS, Config, changes, upgrade_config
from engine.files import ModelError, write_atomic, writing
from model import TMASS

NO_SPACE = "free some space there, or name another folder; an older file of this name is unchanged."


# ---------------------------------------------------------------------------------------------------- writing


def save_checkpoint(path: Path | str, model: TMASS, **more) -> None:
    """Writes a model, and `more` (plain values and tensors), atomically. Raises ModelError if it cannot."""
    content = {"model": model.state_dict(), "arguments": model.arguments, **more}
    with writing(Path(path), ModelError, NO_SPACE):
        write_atomic(Path(path), lambda file: torch.save(content, file))


def save_pretrained(model: TMASS, folder: Path | str, **more) -> None:
    """Writes model.safetensors, and config.json with the arguments of TMASS and `more` (plain values).

    Raises ModelError if they cannot be written or safetensors is not installed."""
    safetensors = import_safetensors()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    config = json.dumps({"model_type": "tmass", "arguments": model.arguments, **more}, indent=2) + "\n"
    for name, content in (
        ("config.json", config.encode()),
        ("model.safetensors", safetensors.torch.save(state)),
    ):
        with writing(Path(folder) / name, ModelError, NO_SPACE):
            write_atomic(Path(folder) / name, content)


def import_safetensors() -> ModuleType:
    """Imports safetensors and returns it. Raises ModelError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise ModelError("safetensors is not installed: pip install safetensors.") from None
    return safetensors


# ---------------------------------------------------------------------------------------------------- opening


def open_checkpoint(path: Path) -> tuple[TMASS, dict, Path]:
    """Opens a run's folder (its best.pt), a folder of save_pretrained, or a file.

    Returns the model (on the CPU, in eval mode), the config it was trained with, and the file. A released
    checkpoint holds no config; {"released": True} is returned for it. Raises ModelError."""
    names = ("best.pt", "model.safetensors") if path.is_dir() else ("",)
    file = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not file.is_file():
        advice = "train first (python train.py), or name a run or checkpoint by --checkpoint"
        raise ModelError(f"{file} not found: {advice}.")
    content = read_checkpoint(file)
    config = {"released": True} if is_released(content) else upgrade_config(content.get("config", {}))
    return build_from_checkpoint(content, file), config, file


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


def from_pretrained(folder: Path | str) -> TMASS:
    """Returns the model that save_pretrained wrote, on the CPU, in eval mode. Raises ModelError."""
    return load_checkpoint(Path(folder) / "model.safetensors")


def read_checkpoint(path: Path | str) -> dict:
    """Returns the content of a file: {"model", "arguments", ...}, or a released one's. Raises ModelError."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return load_file(path)
    config, safetensors = path.with_name("config.json"), import_safetensors()
    if not config.is_file():
        raise ModelError(f"{config} not found: it belongs beside {path.name} (save_pretrained writes both).")
    try:
        return {**json.loads(config.read_text()), "model": safetensors.torch.load_file(path)}
    except (ValueError, OSError, TypeError, safetensors.SafetensorError):
        raise ModelError(f"{path} or its config.json is damaged: copy them again.") from None


def build_from_checkpoint(content: dict, path: Path | str) -> TMASS:
    """Returns the model of a file's content, on the CPU, in eval mode. Raises ModelError, naming `path`."""
    try:
        content = upgrade(from_released(content["state_dict"]) if is_released(content) else content)
        state, arguments = content["model"], content["arguments"]
        names = {name: name.removeprefix("clip.") for name in state if name.startswith("clip.")}
        sizes = clip_sizes({short: state[name] for name, short in names.items()})
        clip = with_movable_mask(import_clip().model.CLIP(**sizes))
        try:
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


# Names in released checkpoints (those of CLIP are Hugging Face's) and names here. Replaced in this order.
RELEASED = {
    "pool_frames.cross_attn.q_proj": "fusion.query",
    "pool_frames.cross_attn.k_proj": "fusion.key",
    "pool_frames.cross_attn.v_proj": "fusion.value",
    "pool_frames.cross_attn.out_proj": "fusion.out",
    "pool_frames.linear_proj": "fusion.linear",
    "pool_frames.layer_norm": "fusion.norm",
    "stochastic.std_branch.linear_proj": "radius.linear",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn.": "attn.",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
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
    names = {}
    for name, value in state.items():
        new = name
        for released, ours in RELEASED.items():
            new = new.replace(released, ours)
        if not name.endswith((".position_ids", ".learnable_scalar")):
            names[new] = value.T if "projection.weight" in name else value
    if "fusion.query.weight" not in names:
        raise KeyError("neither T-MASS nor X-Pool: no pool_frames in it")
    for name in [name for name in names if ".attn.q_proj." in name]:
        qkv = [names.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        names[name.replace("q_proj.", "in_proj_")] = torch.cat(qkv)
    mass = any(name.startswith("stochastic.") for name in state)
    frames = names["radius.linear.weight"].shape[1] if mass else 12
    arguments = dict(fusion="xpool", radius="linear" if mass else "none", num_frames=frames)
    return {"model": names, "arguments": arguments}


# ----------------------------------------------------------------------------------------------------- resume


def load_state(path: Path, config: Config, fingerprint: str) -> dict:
    """Returns the content of last.pt, to resume from. Raises ModelError if flags or data have changed.

    fingerprint: a hash of the training and validation clips. Flags in engine.config.FREE may differ."""
    state = load_file(path)
    if "optimizer" not in state or "config" not in state:
        raise ModelError(f"{path} is not a last.pt of train.py: nothing to resume from; name another --out.")
    changed, recipe = changes(config, state["config"]), state["config"].get("recipe", "paper")
    if changed and recipe != config.recipe:
        changed = [f"--recipe {recipe}, not {config.recipe}"]
    advice = "or name another --out"
    if changed:
        what = f"was made with another config ({', '.join(changed)})"
        raise ModelError(f"{path} {what}: resume with the same flags, {advice}.")
    if state["data"] != fingerprint:
        what = "was trained on other clips or captions"
        raise ModelError(f"{path} {what}: resume with the same data, {advice}.")
    return state
