"""Files of weights: reading them, their layouts, and what tells that a file is not what it should be."""

import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from engine.files import ModelError, first_line

# Errors raised when a state dict is not a CLIP's, or has other shapes.
MISMATCH = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, AssertionError)
# Errors raised for a file that is damaged, or of another format.
DAMAGE = (*MISMATCH, EOFError, MemoryError, struct.error, zlib.error, pickle.UnpicklingError)
DAMAGE += (zipfile.BadZipFile, safetensors.SafetensorError)


# ---- reading


def load_file(path: Path | str) -> dict:
    """Returns the dict in a file of torch.save or safetensors, or the state dict of OpenAI's archive.

    Reads tensors (to the CPU) and plain values only, so it runs no code. Raises ModelError for a missing or
    foreign file, one with other Python objects, and a damaged one: torch stores a checksum of each part."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path} is a folder: name a file in it." if path.is_dir() else f"{path} not found.")
    try:
        content = _read(path)
    except ModelError:
        raise
    except DAMAGE as error:
        if "nsupported global" in str(error) or "nsupported class" in str(error):
            what = "holds Python objects besides tensors and plain values, which could run code when loaded"
            advice = 'if you trust it, keep its "state_dict" alone, torch.save({"state_dict": ...}),'
            raise ModelError(f"{path} {what}: {advice} and name that file.") from None
        what = "is not a file of weights, or is damaged"
        raise ModelError(f"{path} {what}: copy it again, or name another.") from None
    except OSError as error:
        raise ModelError(f"{path} could not be read ({error.strerror or error}): name another.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no dict of weights, but {type(content).__name__}: name another file.")
    return content


def _read(path: Path) -> object:
    """Returns the content of a file by the format of its first bytes, whatever its name."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return safetensors.torch.load_file(path)
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > 4 * path.stat().st_size + 2**26:
                raise ModelError(f"{path} is packed, and larger than it can be: name a file of torch.save.")
            has_checksums = any(part.CRC for part in parts)  # torch can be told to leave them out
            if has_checksums and (broken := archive.testzip()):  # torch.load does not look
                raise ModelError(f"{path} is damaged, {broken} does not match its checksum: copy it again.")
        if any(part.filename.endswith("/constants.pkl") for part in parts):
            with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated
                return dict(torch.jit.load(path, map_location="cpu").state_dict())
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- a CLIP in a file


def read_weights(path: Path) -> tuple[dict, str, bool]:
    """Returns a CLIP's state dict with OpenAI's names, its activation, and whether the file tells it.

    The file may be OpenAI's archive, or one of torch.save or safetensors. It may hold Hugging Face's
    CLIPModel, a module under DataParallel, DDP or torch.compile, or a checkpoint with a CLIP in it. The
    activation is one of ACTIVATIONS. Raises ModelError."""
    content = load_file(path)
    nested = (content.get(name) for name in ("model", "state_dict", "model_state_dict"))
    state = next((state for state in nested if isinstance(state, dict)), content)
    try:
        state = plain_names(state, "ln_final.weight", HUGGING_FACE_MARK, alone=True)
        activation, sure = find_activation(path, content, state)
        state = from_hugging_face(state) if HUGGING_FACE_MARK in state else state
        check_weights(state, path)
    except ModelError:
        raise
    except MISMATCH as error:
        what = f"{path} holds no CLIP of OpenAI's layout ({first_line(error)})"
        raise ModelError(f"{what}: name another file.") from None
    constants = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    return {name: value for name, value in state.items() if name not in constants}, activation, sure


def plain_names(state: dict, *marks: str, alone: bool = False) -> dict:
    """Returns a state dict without what other modules put before its names, such as `module.` or `_orig_mod.`

    marks: names of which a plain state has one. alone: drops the weights of the other modules."""
    plain = {COMPILED.sub("", str(name)): value for name, value in state.items()}
    before = [name.removesuffix(mark) for mark in marks for name in plain if f".{name}".endswith(f".{mark}")]
    prefix = min(before, key=len, default="")
    return {k.removeprefix(prefix): x for k, x in plain.items() if not alone or k.startswith(prefix)}


# What torch.compile, FSDP and activation checkpointing put into names.
COMPILED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Names in Hugging Face's CLIPModel, and OpenAI's. Replaced in this order.
HUGGING_FACE = {
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
HUGGING_FACE_MARK = "text_model.final_layer_norm.weight"


def from_hugging_face(state: dict) -> dict:
    """Returns the state dict of a CLIPModel with OpenAI's names. Raises KeyError if a part is missing.

    q, k and v of a layer become one in_proj, projections are transposed, position_ids are left out."""
    names = {}
    for name, value in state.items():
        new = name
        for theirs, ours in HUGGING_FACE.items():
            new = new.replace(theirs, ours)
        if not name.endswith(".position_ids"):
            names[new] = value.T if "projection.weight" in name else value
    for name in [name for name in names if ".attn.q_proj." in name]:
        qkv = [names.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        names[name.replace("q_proj.", "in_proj_")] = torch.cat(qkv)
    return names


# x sigmoid(1.702 x), OpenAI's; x Phi(x), OpenCLIP's default
ACTIVATIONS = ("quick_gelu", "gelu")


def find_activation(path: Path, content: dict, state: dict) -> tuple[str, bool]:
    """Returns the activation of the CLIP in a file, and whether the file tells it; else it is the likely one.

    Arrays do not show it. The first of these signs counts: a config of Hugging Face, OpenCLIP or ours beside
    the file; the arguments in our checkpoints; the code in an archive; "quickgelu" in a name; the order of a
    layer's arrays, which is that of the class that wrote them. Raises ModelError for another kind of CLIP."""
    configs = from_configs(path)
    if len(configs) > 1 or not configs <= {*ACTIVATIONS}:
        what = f"{path} cannot be used: its config names the activation {' and '.join(sorted(configs))}"
        raise ModelError(f"{what}, not quick_gelu or gelu; name OpenAI's weights, or some tuned from them.")
    if configs:
        return configs.pop(), True
    if isinstance(content.get("arguments"), dict) or "token_embedding.rows" in state:  # our own files
        return content.get("arguments", {}).get("activation", "quick_gelu"), True
    if code := _code(path):
        return "gelu" if b"torch.gelu(" in code else "quick_gelu", True
    if any("quickgelu" in str(name).lower() for name in (path.name, content.get("name"))):
        return "quick_gelu", True
    layer = [name.split(".")[3] for name in state if name.startswith("transformer.resblocks.0.")]
    order = [*dict.fromkeys(layer)]
    if order == ["attn", "ln_1", "mlp", "ln_2"]:  # OpenAI's class, which has no other activation
        return "quick_gelu", True
    return "gelu" if order == ["ln_1", "attn", "ln_2", "mlp"] else "quick_gelu", False  # OpenCLIP's class


def from_configs(path: Path) -> set[str]:
    """Returns the activations that the configs beside a file name: Hugging Face's, OpenCLIP's and ours.

    Raises ModelError if they name other heads than OpenAI's class has, one for 64 channels."""
    config, openclip = (_json(path.with_name(name)) for name in ("config.json", "open_clip_config.json"))
    model, found = openclip.get("model_cfg"), set()
    if isinstance(model, dict):
        found.add("quick_gelu" if model.get("quick_gelu") else "gelu")
    if isinstance(ours := config.get("arguments"), dict):
        found.add(ours.get("activation", "quick_gelu"))
    for part in (config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict):
            found.add(str(part.get("hidden_act", "quick_gelu")))
            width, heads = part.get("hidden_size"), part.get("num_attention_heads")
            if width and heads and width != 64 * heads:
                what = f"{path} cannot be used: its config.json names {heads} heads for {width} channels, not"
                raise ModelError(f"{what} one for 64; name OpenAI's weights, or some tuned from them.")
    return found


def _code(path: Path) -> bytes:
    """Returns the code in a TorchScript archive; nothing for another file."""
    if not zipfile.is_zipfile(path):
        return b""
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".py"))


def _json(path: Path) -> dict:
    """Returns the dict in a JSON file; an empty one if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def check_weights(state: dict, path: Path | str) -> None:
    """Raises ModelError for weights that are NaN or infinite, or that repeat a few values many times."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors.values()}
    if sum(x.nbytes for x in tensors.values()) > 4 * sum(stored.values()):  # as Tensor.expand does
        raise ModelError(f"{path} holds weights that are larger than what it stores: name another file.")
    for name, value in tensors.items():
        if not value.sum().isfinite() and not value.isfinite().all():  # the sum alone is 15 times faster
            what = f"{path} is damaged, or its training diverged: {name} holds NaN or infinite values"
            raise ModelError(f"{what}; name another file.")
