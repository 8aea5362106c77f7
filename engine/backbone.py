"""OpenAI's CLIP, the backbone phi_t and phi_v: its weights, its tokenizer, its precision.

This is the only module that imports the `clip` package."""

import functools
import hashlib
import math
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Int
from torch import Tensor, nn

from engine.distributed import rank_and_world
from engine.files import ModelError, first_line
from engine.weights import ACTIVATIONS, MISMATCH, read_weights
from engine.weights import load_file as load_file  # "as": a re-export

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
             are read from the file, `arch` is ignored, and no value is rounded to float16. The activation is
             what the file's signs say; where it has none, a note says what is assumed.

    Raises ModelError for an unknown arch, a failed download, a missing file, or a file without a CLIP."""
    clip = import_clip()
    if weights is None and (arch == "tiny" or Path(arch).is_file()):
        weights = TINY_FILE if arch == "tiny" else arch
    if weights is not None:
        state, activation, sure = read_weights(Path(weights))
        try:
            state = with_all_words(state)
            model = new_clip(state, activation)
            model.load_state_dict({name: value.float() for name, value in state.items()})
        except MISMATCH as error:
            what, advice = first_line(error), "give OpenAI's .pt file or a state dict of it."
            raise ModelError(f"{weights} holds no CLIP of OpenAI's layout ({what}): {advice}") from None
        if not sure and rank_and_world()[0] == 0:
            file = Path(weights).with_name("open_clip_config.json")
            mine, other = ("GELU", "true") if activation == "gelu" else ("QuickGELU", "false")
            what = f"{weights} does not tell its activation; {mine} is assumed"
            line = f'{{"model_cfg": {{"quick_gelu": {other}}}}}'
            print(f"note: {what}. If it has the other one, write {line} to {file}.", file=sys.stderr)
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


def new_clip(state: dict[str, Tensor], activation: str = "quick_gelu") -> nn.Module:
    """Returns a CLIP with the sizes of a state dict and other weights. Raises one of MISMATCH."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"its activation is {activation!r:.40}")
    clip = import_clip().model.CLIP(**clip_sizes(state))
    blocks = [block for block in clip.modules() if isinstance(getattr(block, "mlp", None), nn.Sequential)]
    for block in blocks if activation == "gelu" else ():
        block.mlp.gelu = nn.GELU()
    return clip


def activation_of(module: nn.Module) -> str:
    """Returns the activation of a CLIP, or of a part of it: one of ACTIVATIONS."""
    return "gelu" if any(isinstance(part, nn.GELU) for part in module.modules()) else "quick_gelu"


def laid_out(clip: nn.Module) -> nn.Module:
    """Prepares a CLIP for speed and autocast. Without autocast its features stay the same.

    As CLIP leaves it, the text transformer's attention mask stays on the CPU, and every layer copies it in
    every step. Channels last is what GPUs want, and four times as fast for a ResNet on a CPU. See `_precise`
    for autocast."""
    for block in clip.transformer.resblocks:
        if "attn_mask" in vars(block):
            block.register_buffer("attn_mask", vars(block).pop("attn_mask"), persistent=False)
    clip.visual.to(memory_format=torch.channels_last)
    for part in clip.visual.modules():
        if type(part) in _precise():
            part.__class__ = _precise()[type(part)]
    return clip


@functools.cache
def _precise() -> dict[type, type]:
    """Subclasses of clip's VisionTransformer and AttentionPool2d, for autocast: the same forward pass, with
    the sum of the layers, the last norm and the projection in float32.

    clip's own rounds all three to the type of its first convolution. In bf16 the features of a random
    ViT-B/32 are then 0.96 % off; 0.24 % so; 0.91 % with the norm and projection alone in float32."""
    model = import_clip().model

    class VisionTransformer(model.VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x).flatten(2).mT.float()  # (images, patches, width)
            first = self.class_embedding.expand(len(x), 1, -1)
            x = self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding)
            x = self.transformer(x.transpose(0, 1))[0]  # of the class token, (images, width)
            with torch.autocast(x.device.type, enabled=False):
                return self.ln_post(x) @ self.proj

    class AttentionPool2d(model.AttentionPool2d):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float())

    return {model.VisionTransformer: VisionTransformer, model.AttentionPool2d: AttentionPool2d}


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


def fingerprint(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """Returns a hash of a module's weights, and of its activation if it is not OpenAI's: 16 hex digits.

    without: beginnings of the names of weights that do not count."""
    weights = hashlib.sha256(b"gelu" if activation_of(module) == "gelu" else b"")
    for name, value in module.state_dict().items():
        if name.startswith(without):
            continue
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
