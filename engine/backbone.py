"""OpenAI's CLIP, the backbone phi_t and phi_v: its weights, its tokenizer, its precision.

This is the only module that imports the `clip` package."""

import hashlib
import math
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Int
from torch import Tensor, nn

from engine.files import ModelError

# A CLIP of the package's own class with a ResNet trunk, small enough to pretrain on two CPU cores in minutes.
TINY = {
    "image_resolution": 64, "vision_layers": (1, 1, 1, 1), "vision_width": 16, "vision_patch_size": None,
    "transformer_width": 128, "transformer_heads": 2, "transformer_layers": 2, "context_length": 32,
    "vocab_size": 49408, "embed_dim": 256,
}  # fmt: skip

# Errors raised when a state dict is not a CLIP's, or has other shapes.
MISMATCH = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, AssertionError)


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
             ~/.cache/clip the first time; "tiny": TINY with random weights; or the path of a file of weights
    weights  a file of weights, for machines without network: OpenAI's .pt archive or a state dict. All sizes
             are read from the file, `arch` is ignored, and no value is rounded to float16.

    Raises ModelError for an unknown arch, a failed download, a missing file, or a file without a CLIP."""
    clip = import_clip()
    if weights is None and Path(arch).is_file():
        weights = arch
    if weights is not None:
        state = read_weights(Path(weights))
        try:
            model = clip.model.CLIP(**clip_sizes(state))
            model.load_state_dict({name: value.float() for name, value in state.items()})
        except MISMATCH as error:
            what, advice = first_line(error), "give OpenAI's .pt file or a state dict of it."
            raise ModelError(f"{weights} holds no CLIP of OpenAI's layout ({what}): {advice}") from None
    elif arch == "tiny":
        model = clip.model.CLIP(**TINY)
    elif arch in clip.available_models():
        try:
            model = clip.load(arch, device="cpu", jit=False)[0]
        except (OSError, RuntimeError) as error:
            file, what = Path(clip.clip._MODELS[arch]).name, f"the weights of {arch} could not be downloaded"
            raise ModelError(f"{what} ({error}): fetch {file} elsewhere and give it by --weights.") from None
    else:
        names = ", ".join(clip.available_models())
        raise ModelError(f"unknown arch {arch!r}: choose tiny, one of {names}, or a file of CLIP weights.")
    return with_movable_mask(model).float().eval()


def with_movable_mask(clip: nn.Module) -> nn.Module:
    """Makes the text transformer's attention mask a buffer, so that it moves to the GPU with the model.

    As CLIP leaves it, the mask stays on the CPU, and every layer copies it in every step."""
    for block in clip.transformer.resblocks:
        if "attn_mask" in vars(block):
            block.register_buffer("attn_mask", vars(block).pop("attn_mask"), persistent=False)
    return clip


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_weights(path: Path) -> dict:
    """Returns the state dict of OpenAI's archive, or of a file that holds one. Raises ModelError."""
    if not path.is_file():
        raise ModelError(f"{path} not found: name a file of CLIP weights.")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated
            state = torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError:
        state = load_file(path)
    return {k: x for k, x in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}


def clip_sizes(state: dict) -> dict:
    """Returns the arguments of clip.model.CLIP for a state dict, from its shapes. Raises one of MISMATCH."""

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
    return sizes | dict(image_resolution=resolution)


def load_file(path: Path | str) -> dict:
    """Returns the dict that torch.save wrote: tensors (on the CPU) and plain values only, so it runs no code.

    Raises ModelError for a missing, damaged or foreign file, and for one with other Python objects."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path} not found.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (*MISMATCH, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        if "nsupported global" in str(error) or "nsupported class" in str(error):
            what = "holds Python objects besides tensors and plain values, which could run code when loaded"
            advice = 'if you trust it, keep its "state_dict" alone, torch.save({"state_dict": ...}),'
            raise ModelError(f"{path} {what}: {advice} and name that file.") from None
        what = "is not a file of weights, or is damaged"
        raise ModelError(f"{path} {what}: copy it again, or name another.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no dict of weights, but {type(content).__name__}: name another file.")
    return content


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
