"""T-MASS: text as a stochastic embedding ("Text-Video Representations", "Stochastic Text Modeling", "Similarity-Aware Radius Modeling").

Each symbol of the paper has one name here, and one shape; axes always come in the order texts, videos, frames, dim.

  paper  name    shape                          paper  name    shape
  t      text    (texts, dim)                   S      sims    (texts, videos, frames)
  f_i    frames  (videos, frames, dim)          R      radius  (texts, videos, dim)
  v      video   (texts, videos, dim)           eps    noise   (M, dim) or (M, texts, videos, dim)
  t_s    t_s     (M, texts, videos, dim)        t_sup  t_sup   (texts, dim), of matched pairs

  phi_t, phi_v    TMASS.encode_text, TMASS.encode_frames (CLIP)      psi    XPool (or MeanPool, the baseline)
  R               Radius                                             t_s    stochastic_text
  t_sup           support_text                                       tau    1 / exp(TMASS.logit_scale)

Readings of the paper taken here: S is made of cosines, of L2-normalised features, while t + R eps is not normalised; every text-video
pair has a radius of its own. Copy this file anywhere: it needs torch and jaxtyping, reads no config, and imports `clip` only to load it.
"""

import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class ModelError(ValueError):
    """A model cannot be built or loaded as asked. The message is one sentence: what is wrong, in which file, what to do."""


# ------------------------------------------------------------------------------------------------- phi: CLIP ("Text-Video Representations")


# What building a model of what are no weights, or another model's, can raise.
FOREIGN = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, AssertionError)
# A CLIP of the package's own class with a ResNet trunk, small enough to pretrain on two CPU cores in minutes.
TINY = dict(embed_dim=256, image_resolution=64, vision_layers=(1, 1, 1, 1), vision_width=16, vision_patch_size=None,
            context_length=32, vocab_size=49408, transformer_width=128, transformer_heads=2, transformer_layers=2)  # fmt: skip


def load_clip(arch: str, weights: Path | str | None = None) -> nn.Module:
    """A CLIP in float32 on the CPU, in eval mode.

    arch     "ViT-B/32", "ViT-B/16" (or any other name of clip.available_models()): OpenAI's weights, downloaded by clip.load into
             ~/.cache/clip the first time; "tiny": TINY, random; or the path of a file
    weights  a file with the weights, for machines without network: OpenAI's own .pt archive or a state dict. The sizes are read from
             the file, whatever `arch` says; values are kept as stored (clip's build_model would round them to fp16).

    Raises ModelError for an unknown arch, a failed download, a missing file or one that holds no CLIP."""
    clip = _import_clip()
    if weights is None and Path(arch).is_file():
        weights = arch
    if weights is not None:
        state = _read_weights(Path(weights))
        try:
            model = clip.model.CLIP(**_clip_sizes(state))
            model.load_state_dict({name: value.float() for name, value in state.items()})
        except FOREIGN as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{weights} holds no CLIP of OpenAI's layout ({what}): give OpenAI's .pt file or a state dict of it.") from None
    elif arch == "tiny":
        model = clip.model.CLIP(**TINY)
    elif arch in clip.available_models():
        try:
            model = clip.load(arch, device="cpu", jit=False)[0]
        except (OSError, RuntimeError) as error:
            raise ModelError(f"the weights of {arch} could not be downloaded ({error}): fetch {Path(clip.clip._MODELS[arch]).name} on another "
                             "machine and name it by --weights.") from None  # fmt: skip
    else:
        raise ModelError(f"unknown arch {arch!r}: choose tiny, one of {', '.join(clip.available_models())}, or a file of CLIP weights.")
    return model.float().eval()


def _import_clip():
    try:
        with warnings.catch_warnings(action="ignore"):  # clip imports pkg_resources, which warns of its age
            import clip
    except RuntimeError:  # PyPI's torchvision is a CUDA build: beside a CPU-only torch it lacks two schemas (data.py has the same)
        _import_clip.schemas = torch.library.Library("torchvision", "DEF")
        for name in ("nms(Tensor dets, Tensor scores, float iou_threshold)", "qnms(Tensor dets, Tensor scores, float iou_threshold)"):
            _import_clip.schemas.define(f"{name} -> Tensor")
        return _import_clip()
    return clip


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path} not found: name a file of CLIP weights.")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated, and OpenAI's archives are made with it
            state = torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError:
        state = load_file(path)
    return {name: value for name, value in state.items() if name not in ("input_resolution", "context_length", "vocab_size")}


def load_file(path: Path | str) -> dict:
    """torch.load of tensors and plain values only, on the CPU; of a .safetensors file, what TMASS.save_pretrained put there.

    Raises ModelError for a missing, corrupt or foreign file, and for one that holds other Python objects: to load them is to run them."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path} not found.")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        if "nsupported global" in str(error) or "nsupported class" in str(error):
            raise ModelError(f"{path} holds Python objects besides tensors and plain values, which could run code when loaded: where you trust it, "
                             'keep its "state_dict" alone, torch.save({"state_dict": ...}), and name that file.') from None  # fmt: skip
        raise ModelError(f"{path} is not a file of weights, or is damaged: copy it again, or name another.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a dict of weights: name another file.")
    return content


def _clip_sizes(state: dict[str, Tensor]) -> dict:
    """The arguments of clip.model.CLIP that fit a state dict, read off the shapes."""

    def count(prefix: str, part: int) -> int:
        return len({name.split(".")[part] for name in state if name.startswith(prefix)})

    width = state["ln_final.weight"].shape[0]
    text = dict(context_length=state["positional_embedding"].shape[0], vocab_size=state["token_embedding.weight"].shape[0],
                transformer_width=width, transformer_heads=width // 64, transformer_layers=count("transformer.resblocks.", 2))  # fmt: skip
    if "visual.proj" in state:  # a vision transformer
        patch = state["visual.conv1.weight"].shape[-1]
        grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
        vision = dict(image_resolution=patch * grid, vision_patch_size=patch, vision_width=state["visual.conv1.weight"].shape[0],
                      vision_layers=count("visual.transformer.resblocks.", 3))  # fmt: skip
    else:  # a ResNet
        grid = math.isqrt(state["visual.attnpool.positional_embedding"].shape[0] - 1)
        vision = dict(image_resolution=32 * grid, vision_patch_size=None, vision_width=state["visual.layer1.0.conv1.weight"].shape[0],
                      vision_layers=tuple(count(f"visual.layer{k}.", 2) for k in (1, 2, 3, 4)))  # fmt: skip
    return dict(embed_dim=state["text_projection"].shape[1], **vision, **text)


# ------------------------------------------------------------------------------------------------------- psi: fusion of frames into v


class MeanPool(nn.Module):
    """v = mean_i f_i / |f_i|: no psi at all, the same video for every text (CLIP4Clip's parameter-free baseline)."""

    def forward(self, text: Float[Tensor, "texts dim"], frames: Float[Tensor, "videos frames dim"]) -> Float[Tensor, "texts videos dim"]:
        return F.normalize(frames, dim=-1).mean(dim=1).expand(len(text), -1, -1)


class XPool(nn.Module):
    """psi, X-Pool's text-conditioned fusion: v = psi(t, [f_1 .. f_T']), the video as the text looks at it.

        q = W_q LN1(t)     k_i = W_k LN1(f_i)     u_i = W_v LN1(f_i)
        a = softmax_i(q . k_i / sqrt(dim / heads))                      attention of a text over the frames
        o = LN2(W_o sum_i a_i u_i)
        v = LN3(o + dropout(P o))

    All products have biases; all weights start as the identity and all biases at zero, as X-Pool's do, so that psi starts as
    attention by the features' own likeness."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.3):
        super().__init__()
        if dim % heads:
            raise ModelError(f"{heads} heads do not divide {dim} channels: choose a divisor.")
        self.heads = heads
        self.query, self.key, self.value, self.out, self.linear = (nn.Linear(dim, dim) for _ in range(5))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        for layer in (self.query, self.key, self.value, self.out, self.linear):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def attention(self, text: Float[Tensor, "texts dim"], frames: Float[Tensor, "videos frames dim"]) -> Float[Tensor, "texts videos heads frames"]:
        """a: how much each text looks at each frame; sums to one over the frames."""
        query = self.query(self.norm1(text)).unflatten(-1, (self.heads, -1))  # (texts, heads, dim / heads)
        key = self.key(self.norm1(frames)).unflatten(-1, (self.heads, -1))  # (videos, frames, heads, dim / heads)
        return (torch.einsum("thd,vfhd->tvhf", query, key) / query.shape[-1] ** 0.5).softmax(dim=-1)

    def forward(self, text: Float[Tensor, "texts dim"], frames: Float[Tensor, "videos frames dim"]) -> Float[Tensor, "texts videos dim"]:
        value = self.value(self.norm1(frames)).unflatten(-1, (self.heads, -1))  # (videos, frames, heads, dim / heads)
        pooled = torch.einsum("tvhf,vfhd->tvhd", self.attention(text, frames), value).flatten(-2)
        o = self.norm2(self.out(pooled))  # (texts, videos, dim)
        return self.norm3(o + self.dropout(self.linear(o)))


# -------------------------------------------------------------------------------------- the text mass ("Stochastic Text Modeling")


class Radius(nn.Module):
    """R, the radius of the text mass, one for each text-video pair and channel ("Similarity-Aware Radius Modeling").

        S_i = cos(t, f_i)                           of a text and the frames of a video
        kind "fixed"     R = exp(mean_i S_i)                no parameter
        kind "scalar"    R = exp(theta mean_i S_i)          one learned number
        kind "linear"    R = exp(S W + b)                   W (frames, dim) learned; the paper's choice
        kind "joint"     R = exp(S W + b + W_o gelu(W_t t' + W_v v'))         not in the paper: R knows text and video, not only their
                         cosines; t' and v' are t and v = psi(t, f) at length sqrt(dim); W_o starts near 0, so that it starts as "linear"

    The paper writes exp(S W); the bias b is the released code's. It starts at log(initial), so that `initial` is about the radius
    that training starts from (1 in the paper); W starts as torch's Linear does. Adds a channel axis of size dim for "fixed" and
    "scalar" too. The released code computes R for matched pairs only while it trains; here every pair has its own."""

    def __init__(self, kind: str, frames: int, dim: int, initial: float = 1.0):
        super().__init__()
        if kind not in ("fixed", "scalar", "linear", "joint"):
            raise ModelError(f"unknown radius {kind!r}: choose fixed, scalar, linear or joint.")
        self.kind, self.frames, self.dim = kind, frames, dim
        if kind == "scalar":
            self.theta = nn.Parameter(torch.ones(()))
        if kind in ("linear", "joint"):
            self.linear = nn.Linear(frames, dim)
            nn.init.constant_(self.linear.bias, math.log(initial))
        if kind == "joint":
            self.text, self.video, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
            nn.init.normal_(self.out.weight, std=1e-3)

    def forward(
        self,
        text: Float[Tensor, "texts dim"],
        frames: Float[Tensor, "videos frames dim"],
        video: Float[Tensor, "texts videos dim"] | None = None,
    ) -> Float[Tensor, "texts videos dim"]:
        """R of every pair; `video`, v = psi(t, f), is read by "joint" alone."""
        return self.from_similarities(cosine_similarities(text, frames), text[:, None], video)

    def from_similarities(
        self, sims: Float[Tensor, "*pairs frames"], text: Tensor | None = None, video: Tensor | None = None
    ) -> Float[Tensor, "*pairs dim"]:
        """R of similarities S that are at hand already; "joint" reads t and v of these pairs too, (*pairs, dim) or what broadcasts to it."""
        if self.kind in ("linear", "joint"):
            exponent = self.linear(sims)
            if self.kind == "joint":
                if text is None or video is None:
                    raise ModelError('the radius "joint" needs t and v beside S: radius(text, frames, video).')
                t, v = (F.normalize(x, dim=-1) * self.dim**0.5 for x in (text, video))
                exponent = exponent + self.out(F.gelu(self.text(t) + self.video(v)))
            return exponent.exp_()  # in place: the exponent itself is not needed again
        mean = sims.mean(dim=-1, keepdim=True)
        theta = self.theta if self.kind == "scalar" else 1.0
        return (theta * mean).exp().expand(*sims.shape[:-1], self.dim)


def cosine_similarities(text: Float[Tensor, "texts dim"], frames: Float[Tensor, "videos frames dim"]) -> Float[Tensor, "texts videos frames"]:
    """S: cos(text i, frame k of video j)."""
    return torch.einsum("td,vfd->tvf", F.normalize(text, dim=-1), F.normalize(frames, dim=-1))


def stochastic_text(
    text: Float[Tensor, "texts dim"],
    radius: Float[Tensor, "texts videos dim"],
    noise: Float[Tensor, "M dim"] | Float[Tensor, "M texts videos dim"],
) -> Float[Tensor, "M texts videos dim"]:
    """t_s = t + R * eps: M texts drawn from the mass of each pair (eq. of "Stochastic Text Modeling").

    The paper draws eps ~ N(0, 1). The released code draws U(0, 1) by default and N(0, 0.003^2) for LSMDC. With noise (M, dim) the
    same M draws serve every pair: each pair's samples keep their distribution, and pairs are compared on the same luck."""
    if noise.dim() == 2:
        noise = noise[:, None, None]
    return text[:, None] + radius * noise


def support_text(
    text: Float[Tensor, "texts dim"], video: Float[Tensor, "texts dim"], radius: Float[Tensor, "texts dim"]
) -> Float[Tensor, "texts dim"]:
    """t_sup = t + (v - t) / |v - t| * R: the point of the mass's surface towards the video ("Learning Text Mass in Joint Space").

    Row i of `video` and `radius` belongs to text i: its matched pair. Here v is pooled by its own text; the released code averages it
    over the texts of the batch."""
    return text + F.normalize(video - text, dim=-1) * radius


def matched(pairs: Float[Tensor, " n n *rest"]) -> Float[Tensor, " n *rest"]:
    """The matched pairs of a batch, in which text i belongs to video i: x[i, i]."""
    index = torch.arange(len(pairs), device=pairs.device)
    return pairs[index, index]


# ------------------------------------------------------------------------------------------------------------------ the whole model


class TMASS(nn.Module):
    """The model of one of three methods, with the parts in which they differ:

        method    fusion (psi)    radius (R)
        "clip"    MeanPool        -             mean-pooled frames: CLIP4Clip's baseline
        "xpool"   XPool           -             X-Pool, the paper's baseline
        "tmass"   XPool           Radius        T-MASS

    Parts are called one by one, in the paper's order (train.py, evaluate.py): encode_text, encode_frames, fusion, radius."""

    def __init__(
        self,
        clip: nn.Module,
        method: str = "tmass",
        num_frames: int = 12,
        radius: str = "linear",
        heads: int = 1,
        dropout: float = 0.3,
        initial_radius: float = 1.0,
    ):
        super().__init__()
        if method not in ("clip", "xpool", "tmass"):
            raise ModelError(f"unknown method {method!r}: choose clip, xpool or tmass.")
        dim = clip.text_projection.shape[1]
        for block in clip.transformer.resblocks:
            if "attn_mask" in vars(block):  # a buffer moves with the model; CLIP leaves it on the CPU and copies it in each layer of each step
                block.register_buffer("attn_mask", vars(block).pop("attn_mask"), persistent=False)
        self.arguments = dict(method=method, num_frames=num_frames, radius=radius, heads=heads, dropout=dropout, initial_radius=initial_radius)
        self.clip = clip
        self.fusion = MeanPool() if method == "clip" else XPool(dim, heads, dropout)
        self.radius = Radius(radius, num_frames, dim, initial_radius) if method == "tmass" else None

    @property
    def logit_scale(self) -> nn.Parameter:
        """log(1 / tau): CLIP's own learned temperature."""
        return self.clip.logit_scale

    @property
    def resolution(self) -> int:
        """Pixels a side of the frames that phi_v takes."""
        return self.clip.visual.input_resolution

    def encode_text(self, tokens: Int[Tensor, "texts tokens"]) -> Float[Tensor, "texts dim"]:
        """t = phi_t(caption), not normalised: what CLIP's text transformer holds at the end mark, the largest token.

        The same numbers as clip's own encode_text, whose index lives on the CPU: that makes a GPU wait."""
        clip = self.clip
        x = clip.token_embedding(tokens) + clip.positional_embedding[: tokens.shape[1]]
        x = clip.transformer(x.transpose(0, 1)).transpose(0, 1)  # (texts, tokens, width)
        end = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
        return (clip.ln_final(end) @ clip.text_projection).float()

    def encode_frames(self, images: Float[Tensor, "videos frames 3 height width"]) -> Float[Tensor, "videos frames dim"]:
        """f_i = phi_v(frame i), each frame by itself, not normalised."""
        return self.clip.encode_image(images.flatten(0, 1)).float().unflatten(0, images.shape[:2])

    def save_pretrained(self, folder: Path | str, **more) -> None:
        """Writes model.safetensors and config.json (the arguments of this class, and `more`: plain values) into a folder. Raises ModelError."""
        safetensors = _import_safetensors()
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        config = json.dumps({"model_type": "tmass", "arguments": self.arguments, **more}, indent=2) + "\n"
        _write_whole(Path(folder) / "config.json", lambda file: file.write(config.encode()))
        _write_whole(Path(folder) / "model.safetensors", lambda file: file.write(safetensors.torch.save(state)))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "TMASS":
        """The model that save_pretrained put into a folder, on the CPU, in eval mode. Raises ModelError."""
        return load_checkpoint(Path(folder) / "model.safetensors")


# --------------------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path | str, model: TMASS, **more) -> None:
    """Writes a model (and `more`: plain values and tensors) so that a file that has the name is whole, whatever ends the program.

    Raises ModelError where it cannot be written (a full disk, say); an older file of that name is then as it was."""
    content = {"model": model.state_dict(), "arguments": model.arguments, **more}
    _write_whole(Path(path), lambda file: torch.save(content, file))


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes beside, on to the disk itself, and only then under the name."""
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        partial.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        what = getattr(reason, "strerror", None) or str(reason).strip().splitlines()[0]
        raise ModelError(f"{path} could not be written ({what}): make room there, or name another folder; what was there before is whole.") from None


def load_checkpoint(path: Path | str) -> TMASS:
    """The model of a checkpoint, on the CPU, in eval mode; loads strictly, reads all sizes from the file, runs no code of it.

    Opens what save_checkpoint and save_pretrained write, and the checkpoints that the T-MASS and X-Pool authors released (`from_released`).
    Raises ModelError for a missing, corrupt or foreign file."""
    return build_from_checkpoint(load_file(path), path)


def build_from_checkpoint(content: dict, path: Path | str) -> TMASS:
    """What load_checkpoint does once the file is read; `path` is named in errors."""
    try:
        if is_released(content):
            content = from_released(content["state_dict"])
        state, arguments = content["model"], content["arguments"]
        sizes = _clip_sizes({name.removeprefix("clip."): value for name, value in state.items() if name.startswith("clip.")})
        model = TMASS(_import_clip().model.CLIP(**sizes), **arguments)
        model.load_state_dict(state)
    except FOREIGN as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} is not a checkpoint of train.py ({what}): name one of its last.pt or best.pt, or a released checkpoint of "
                         "T-MASS or X-Pool.") from None  # fmt: skip
    return model.float().eval()


def is_released(content: dict) -> bool:
    """Whether what a file holds is laid out as the released T-MASS and X-Pool code saves it: {"epoch", "state_dict", "optimizer"}."""
    return isinstance(content.get("state_dict"), dict) and "model" not in content


# Names of the released checkpoints (Hugging Face's names inside CLIP), and the same parts here. Replaced in this order.
RELEASED = {
    "pool_frames.cross_attn.q_proj": "fusion.query", "pool_frames.cross_attn.k_proj": "fusion.key",
    "pool_frames.cross_attn.v_proj": "fusion.value", "pool_frames.cross_attn.out_proj": "fusion.out",
    "pool_frames.linear_proj": "fusion.linear", "pool_frames.layer_norm": "fusion.norm",
    "stochastic.std_branch.linear_proj": "radius.linear",
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final", "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.embeddings.class_embedding": "visual.class_embedding", "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "layer_norm": "ln_", "self_attn.": "attn.", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj",
}  # fmt: skip


def from_released(state: dict[str, Tensor]) -> dict:
    """The state_dict of a released T-MASS or X-Pool checkpoint as what save_checkpoint writes: {"model", "arguments"}.

        released                                      here
        clip.text_model, clip.vision_model            clip (OpenAI's names): q, k and v of a layer in one in_proj, heads of 64 channels,
                                                      QuickGELU, eps 1e-5, the text read at its first end mark
        clip.{text,visual}_projection                 clip.text_projection, clip.visual.proj (transposed)
        pool_frames                                   fusion: psi. One head: the shapes do not say, and it is the released default
        stochastic.std_branch.linear_proj             radius: R = exp(linear(S)) on cosines, as here; weight (dim, frames) gives T'

    Left out: position_ids (a count, in older files) and learnable_scalar, which the released code neither sets nor uses. Without
    `stochastic` the file is X-Pool's, with T' = 12, the released default. Such a file does not say which noise its model was trained
    with: U(0, 1) is the released default, N(0, 0.003^2) its command for LSMDC (evaluate.py --prior, --prior-std)."""
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
        names[name.replace("q_proj.", "in_proj_")] = torch.cat([names.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"])
    frames = names["radius.linear.weight"].shape[1] if any(name.startswith("stochastic.") for name in state) else None
    return {"model": names, "arguments": {"method": "tmass" if frames else "xpool", "num_frames": frames or 12}}


def _import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ModelError("safetensors is not installed: pip install safetensors.") from None
    return safetensors


def _load_safetensors(path: Path) -> dict:
    config, safetensors = path.with_name("config.json"), _import_safetensors()
    if not config.is_file():
        raise ModelError(f"{config} not found: it belongs beside {path.name} (TMASS.save_pretrained writes both).")
    try:
        return {**json.loads(config.read_text()), "model": safetensors.torch.load_file(path)}
    except (ValueError, OSError, TypeError, safetensors.SafetensorError):
        raise ModelError(f"{path} or its config.json is damaged: copy them again.") from None
