"""OpenAI's CLIP, the backbone phi_t and phi_v: its weights, its tokenizer, its precision.

This is the only module that imports the `clip` package."""

import functools
import hashlib
import json
import math
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import safetensors.torch
import torch
from jaxtyping import Int
from torch import Tensor, nn

from engine.files import ModelError

# "tiny": a CLIP of the package's own class, pretrained on the built-in clips by engine/tiny_clip.py.
TINY_FILE = Path(__file__).resolve().parent.parent / "assets" / "tiny_clip.safetensors"
TINY = {
    "image_resolution": 64, "vision_layers": (1, 1, 1, 1), "vision_width": 16, "vision_patch_size": None,
    "transformer_width": 128, "transformer_heads": 2, "transformer_layers": 2, "context_length": 32,
    "vocab_size": 49408, "embed_dim": 256,
}  # fmt: skip


@functools.cache
def tiny_mark() -> str:
    """A hash of TINY_FILE, 16 hex digits: runs record which tiny CLIP they started from."""
    return hashlib.sha256(TINY_FILE.read_bytes()).hexdigest()[:16]


# Errors raised when a state dict is not a CLIP's, or has other shapes.
MISMATCH = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, AssertionError)
# Errors raised for a file that is damaged, or of another format.
DAMAGE = (*MISMATCH, EOFError, MemoryError, struct.error, zlib.error, pickle.UnpicklingError)
DAMAGE += (zipfile.BadZipFile, safetensors.SafetensorError)


def import_clip() -> ModuleType:
    """Imports OpenAI's `clip` package and returns it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # it uses pkg_resources, which is deprecated
            import clip
    except RuntimeError:  # PyPI's torchvision is a CUDA build; a CPU-only torch lacks two of its operators
        import_clip.schemas = torch.library.Library("torchvision", "DEF")  # kept: torch removes them with it
        for name in ("nms", "qnms"):
            import_clip.schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return import_clip()
    return clip


# ---------------------------------------------------------------------------------------------------- weights


def load_clip(arch: str, weights: Path | str | None = None) -> nn.Module:
    """Returns a CLIP in float32 on the CPU, in eval mode.

    arch     "ViT-B/32", "ViT-B/16" or another of clip.available_models(): OpenAI's weights, downloaded into
             ~/.cache/clip the first time; "tiny": TINY_FILE; or the path of a file of weights
    weights  a file of weights, for machines without network: OpenAI's .pt archive or a state dict. All sizes
             are read from the file, `arch` is ignored, and no value is rounded to float16.

    Raises ModelError for an unknown arch, a failed download, a missing file, or a file without a CLIP."""
    clip = import_clip()
    if weights is None and (arch == "tiny" or Path(arch).is_file()):
        weights = TINY_FILE if arch == "tiny" else arch
    if weights is not None:
        state = with_all_words(read_weights(Path(weights)))
        try:
            model = clip.model.CLIP(**clip_sizes(state))
            model.load_state_dict({name: value.float() for name, value in state.items()})
        except MISMATCH as error:
            what, advice = first_line(error), "give OpenAI's .pt file or a state dict of it."
            raise ModelError(f"{weights} holds no CLIP of OpenAI's layout ({what}): {advice}") from None
    elif arch in clip.available_models():
        try:
            model = clip.load(arch, device="cpu", jit=False)[0]
        except (OSError, RuntimeError) as error:
            file, what = Path(clip.clip._MODELS[arch]).name, f"the weights of {arch} could not be downloaded"
            raise ModelError(f"{what} ({error}): fetch {file} elsewhere and give it by --weights.") from None
    else:
        names = ", ".join(clip.available_models())
        raise ModelError(f"unknown arch {arch!r}: choose tiny, one of {names}, or a file of CLIP weights.")
    return laid_out(model).float().eval()


def with_all_words(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with a row for each token of CLIP. The tiny CLIP's file holds only those that it knows.

    `token_embedding.rows` are their numbers; all other rows are zero."""
    known = {name: value for name, value in state.items() if name != "token_embedding.rows"}
    if len(known) < len(state):
        embedding = known["token_embedding.weight"]
        known["token_embedding.weight"] = embedding.new_zeros(TINY["vocab_size"], embedding.shape[1])
        known["token_embedding.weight"][state["token_embedding.rows"].long()] = embedding
    return known


def unknown_words(clip: nn.Module, text: str) -> list[str]:
    """The words of a text of which a CLIP knows no token: their embeddings are zero."""
    weight, encode = clip.token_embedding.weight, import_clip().clip._tokenizer.encode
    words = dict.fromkeys(re.findall(r"\w+", text.lower()))
    return [word for word in words if not weight[encode(word)].any()]


def laid_out(clip: nn.Module) -> nn.Module:
    """Prepares a CLIP for speed: its mask moves with it, and its pictures are laid out channel by channel.

    As CLIP leaves it, the text transformer's attention mask stays on the CPU, and every layer copies it in
    every step. Channels last is what GPUs want, and four times as fast for a ResNet on a CPU."""
    for block in clip.transformer.resblocks:
        if "attn_mask" in vars(block):
            block.register_buffer("attn_mask", vars(block).pop("attn_mask"), persistent=False)
    clip.visual.to(memory_format=torch.channels_last)
    return clip


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_weights(path: Path) -> dict:
    """Returns a CLIP's state dict with OpenAI's names. Raises ModelError.

    The file may be OpenAI's archive, or one of torch.save or safetensors. It may hold Hugging Face's
    CLIPModel, a module under DataParallel, DDP or torch.compile, or a checkpoint with a CLIP in it."""
    content = load_file(path)
    nested = (content.get(name) for name in ("model", "state_dict", "model_state_dict"))
    content = next((state for state in nested if isinstance(state, dict)), content)
    try:
        state = plain_names(content, "ln_final.weight", HUGGING_FACE_MARK, alone=True)
        state = from_hugging_face(state) if HUGGING_FACE_MARK in state else state
        check_weights(state, path)
    except ModelError:
        raise
    except MISMATCH as error:
        what = f"{path} holds no CLIP of OpenAI's layout ({first_line(error)})"
        raise ModelError(f"{what}: name another file.") from None
    if reason := unlike_openai(path.parent):
        raise ModelError(f"{path} cannot be used: {reason}; name OpenAI's weights, or some tuned from them.")
    constants = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    return {name: value for name, value in state.items() if name not in constants}


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


def unlike_openai(folder: Path) -> str:
    """Returns what the configs beside a file tell of a model that OpenAI's class computes differently, or "".

    Weights do not tell the activation and the number of heads; Hugging Face's and OpenCLIP's configs do."""
    config, openclip = (_json(folder / name) for name in ("config.json", "open_clip_config.json"))
    if (model := openclip.get("model_cfg")) and not (isinstance(model, dict) and model.get("quick_gelu")):
        return "its open_clip_config.json names another activation than QuickGELU"
    for part in (config.get("text_config"), config.get("vision_config")):
        part = part if isinstance(part, dict) else {}
        if (activation := part.get("hidden_act", "quick_gelu")) != "quick_gelu":
            return f"its config.json names the activation {activation}, not quick_gelu"
        width, heads = part.get("hidden_size"), part.get("num_attention_heads")
        if width and heads and width != 64 * heads:
            return f"its config.json names {heads} heads for {width} channels, not one for 64"
    return ""


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


def clip_sizes(state: dict) -> dict:
    """Returns the arguments of clip.model.CLIP for a state dict, from its shapes. Raises one of MISMATCH.

    A model of these sizes must not be larger than the state, so that wrong shapes cannot fill the memory."""

    def count(prefix: str, part: int) -> int:
        return len({name.split(".")[part] for name in state if name.startswith(prefix)})

    def size(name: str, axis: int = 0) -> int:
        return state[name].shape[axis]

    sizes = dict(embed_dim=size("text_projection", 1), transformer_width=size("ln_final.weight"))
    sizes |= dict(context_length=size("positional_embedding"), vocab_size=size("token_embedding.weight"))
    heads, layers = size("ln_final.weight") // 64, count("transformer.resblocks.", 2)
    sizes |= dict(transformer_heads=heads, transformer_layers=layers)
    if "visual.proj" in state:  # a vision transformer
        width, patch = size("visual.conv1.weight"), size("visual.conv1.weight", -1)
        layers = count("visual.transformer.resblocks.", 3)
        resolution = patch * math.isqrt(size("visual.positional_embedding") - 1)
    else:  # a ResNet
        width, patch = size("visual.layer1.0.conv1.weight"), None
        layers = tuple(count(f"visual.layer{k}.", 2) for k in (1, 2, 3, 4))
        resolution = 32 * math.isqrt(size("visual.attnpool.positional_embedding") - 1)
    sizes |= dict(vision_width=width, vision_patch_size=patch, vision_layers=layers)
    sizes |= dict(image_resolution=resolution)
    with torch.device("meta"):  # without memory
        model = import_clip().model.CLIP(**sizes)
    if sum(x.numel() for x in model.parameters()) > sum(x.numel() for x in state.values()):
        raise ValueError("its sizes do not fit together")
    return sizes


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


def fingerprint(module: nn.Module) -> str:
    """Returns a hash of a module's weights, 16 hex digits."""
    weights = hashlib.sha256()
    for name, value in module.state_dict().items():
        weights.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return weights.hexdigest()[:16]


# --------------------------------------------------------------------------------------- tokenizer, precision


def tokenize(captions: Sequence[str], context_length: int = 77) -> Int[Tensor, "texts tokens"]:
    """Returns CLIP's tokens with start and end marks. Long captions are cut; the end mark is kept."""
    return import_clip().tokenize(list(captions), context_length, truncate=True)


def count_tokens(caption: str) -> int:
    """Returns the number of tokens of an uncut caption, start and end marks included."""
    return len(import_clip().clip._tokenizer.encode(caption)) + 2


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Returns the autocast context of --amp; with "off" it does nothing."""
    kind = resolve_amp(device, amp)
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=kind != "off")


def resolve_amp(device: torch.device, amp: str) -> str:
    """Returns bf16, fp16 or off. "auto": bf16 on CUDA (fp16 on GPUs without bfloat16), off on the CPU."""
    if amp != "auto" or device.type != "cuda":
        return amp if amp != "auto" else "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
