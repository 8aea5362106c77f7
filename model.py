"""T-MASS: text as a stochastic embedding ("Text-Video Representations", "Stochastic Text Modeling" and on).

Each symbol has one name and one shape, here, in the tests and in the notebooks. Axes always come in the order
texts, videos, frames, dim. Copy this file anywhere: it needs torch and jaxtyping.

  paper  name    shape                      paper  name    shape
  t      text    (texts, dim)               S      sims    (texts, videos, frames)
  f_i    frames  (videos, frames, dim)      R      radius  (texts, videos, dim)
  v      video   (texts, videos, dim)       eps    noise   (M, dim) or (M, texts, videos, dim)
  t_s    t_s     (M, texts, videos, dim)    t_sup  t_sup   (texts, dim), of matched pairs

  phi_t, phi_v  TMASS.encode_text, TMASS.encode_frames (CLIP)     psi  FUSIONS (X-Pool's: XPool)
  R             RADII (the paper's: LinearRadius)                 tau  1 / exp(TMASS.logit_scale)
"""

import importlib
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Text = Float[Tensor, "texts dim"]
Frames = Float[Tensor, "videos frames dim"]
Pairs = Float[Tensor, "texts videos dim"]  # v, R: of every text with every video


# -------------------------------------------------------------- psi: the video, as a text looks at its frames
class MeanPool(nn.Module):
    """v = mean_i f_i / |f_i|: the same video for every text (CLIP4Clip's parameter-free baseline)."""

    def __init__(self, dim: int | None = None, heads: int = 1, dropout: float = 0.0):
        super().__init__()  # every psi has these arguments; mean pooling uses none of them

    def forward(self, text: Text, frames: Frames) -> Pairs:
        return F.normalize(frames, dim=-1).mean(dim=1).expand(len(text), -1, -1)


class XPool(nn.Module):
    """psi, X-Pool's text-conditioned fusion: v = psi(t, [f_1 .. f_T']) ("Text-Video Representations").

        q = W_q LN1(t)     k_i = W_k LN1(f_i)     u_i = W_v LN1(f_i)
        a = softmax_i(q . k_i / sqrt(dim / heads))                      attention of a text over the frames
        o = LN2(W_o sum_i a_i u_i)
        v = LN3(o + dropout(P o))

    As in X-Pool, W and P have biases and start as the identity. Raises ValueError: heads must divide dim."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.3):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels: choose a divisor of {dim}.")
        self.heads = heads
        self.query, self.key, self.value, self.out, self.linear = (nn.Linear(dim, dim) for _ in range(5))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        for layer in (self.query, self.key, self.value, self.out, self.linear):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def attention(self, text: Text, frames: Frames) -> Float[Tensor, "texts videos heads frames"]:
        """a: the weight of each frame for each text. Sums to one over the frames."""
        query = self.query(self.norm1(text)).unflatten(-1, (self.heads, -1))  # (texts, heads, dim / heads)
        key = self.key(self.norm1(frames)).unflatten(-1, (self.heads, -1))  # (videos, frames, heads, ...)
        return (torch.einsum("thd,vfhd->tvhf", query, key) / query.shape[-1] ** 0.5).softmax(dim=-1)

    def forward(self, text: Text, frames: Frames) -> Pairs:
        value = self.value(self.norm1(frames)).unflatten(-1, (self.heads, -1))
        pooled = torch.einsum("tvhf,vfhd->tvhd", self.attention(text, frames), value).flatten(-2)
        o = self.norm2(self.out(pooled))  # (texts, videos, dim)
        return self.norm3(o + self.dropout(self.linear(o)))


# Every psi by its name (--fusion). To add one, write a class with the same arguments, and list it here.
FUSIONS = {"mean": MeanPool, "xpool": XPool}


# --------------------------------------------------------------------- R ("Similarity-Aware Radius Modeling")
def cosine_similarities(text: Text, frames: Frames) -> Float[Tensor, "texts videos frames"]:
    """S: cos(text i, frame k of video j)."""
    return torch.einsum("td,vfd->tvf", F.normalize(text, dim=-1), F.normalize(frames, dim=-1))


class Radius(nn.Module):
    """R = exp(e) of every text-video pair and channel. A subclass defines `exponent`, which returns e.

    exponent(sims, text, video): S (*pairs, frames), t and v (*pairs, dim) -> e, (*pairs, dim) or (*pairs, 1).
    Every pair has its own R, also with --pairs matched, whose loss reads that of matched pairs only."""

    def __init__(self, frames: int, dim: int, initial: float = 1.0):
        super().__init__()
        self.dim = dim

    def from_similarities(
        self, sims: Float[Tensor, "*pairs frames"], text: Tensor | None = None, video: Tensor | None = None
    ) -> Float[Tensor, "*pairs dim"]:
        """R of similarities S that are known already, and of t and v of the same pairs."""
        return self.exponent(sims, text, video).exp().expand(*sims.shape[:-1], self.dim)

    def forward(self, text: Text, frames: Frames, video: Pairs | None = None) -> Pairs:
        """R of all pairs; `video` is v = psi(t, f)."""
        return self.from_similarities(cosine_similarities(text, frames), text[:, None], video)


class FixedRadius(Radius):
    """R = exp(mean_i S_i), the same in every channel: no parameter."""

    def exponent(self, sims: Tensor, text: Tensor | None, video: Tensor | None) -> Tensor:
        return sims.mean(dim=-1, keepdim=True)


class ScalarRadius(Radius):
    """R = exp(theta mean_i S_i), the same in every channel: one learned number theta, which starts at 1."""

    def __init__(self, frames: int, dim: int, initial: float = 1.0):
        super().__init__(frames, dim)
        self.theta = nn.Parameter(torch.ones(()))

    def exponent(self, sims: Tensor, text: Tensor | None, video: Tensor | None) -> Tensor:
        return self.theta * sims.mean(dim=-1, keepdim=True)


class LinearRadius(Radius):
    """R = exp(S W + b), the paper's with the released code's bias b: W (frames, dim) is learned.

    b starts at log(initial), so R starts near `initial`. W starts at random, as torch's; in the released code
    as the identity (--radius-start)."""

    def __init__(self, frames: int, dim: int, initial: float = 1.0):
        super().__init__(frames, dim)
        self.linear = nn.Linear(frames, dim)
        nn.init.constant_(self.linear.bias, math.log(initial))

    def exponent(self, sims: Tensor, text: Tensor | None, video: Tensor | None) -> Tensor:
        return self.linear(sims)


class JointRadius(LinearRadius):
    """R = exp(S W + b + W_o gelu(W_t t' + W_v v')): it reads text and video, not only S. Not in the paper.

    t' and v' are t and v scaled to length sqrt(dim). W_o starts near 0, so this starts as LinearRadius."""

    def __init__(self, frames: int, dim: int, initial: float = 1.0):
        super().__init__(frames, dim, initial)
        self.text, self.video = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.out.weight, std=1e-3)

    def exponent(self, sims: Tensor, text: Tensor | None, video: Tensor | None) -> Tensor:
        if text is None or video is None:
            raise ValueError('the radius "joint" needs t and v beside S: radius(text, frames, video).')
        t, v = (F.normalize(x, dim=-1) * self.dim**0.5 for x in (text, video))
        return self.linear(sims) + self.out(F.gelu(self.text(t) + self.video(v)))


# Every R by its name (--radius; "none": no mass). To add one, write a class and list it here.
RADII = {"fixed": FixedRadius, "scalar": ScalarRadius, "linear": LinearRadius, "joint": JointRadius}


# ----------------------------------------------------------------- the text mass ("Stochastic Text Modeling")
def sample_noise(
    M: int, *shape: int, prior: str = "normal", std: float = 1.0, generator=None, device=None
) -> Float[Tensor, "draws ..."]:
    """eps of M draws, (M, *shape): N(0, std^2), the paper's with std = 1, or U(0, 1) for prior "uniform"."""
    if prior == "uniform":
        return torch.rand(M, *shape, generator=generator, device=device)
    return std * torch.randn(M, *shape, generator=generator, device=device)


def stochastic_text(
    text: Text, radius: Pairs, noise: Float[Tensor, "M dim"] | Float[Tensor, "M texts videos dim"]
) -> Float[Tensor, "M texts videos dim"]:
    """t_s = t + R * eps: M texts drawn from the mass of each pair. Noise (M, dim) is shared by all pairs."""
    return text[:, None] + radius * (noise[:, None, None] if noise.dim() == 2 else noise)


def support_text(text: Text, video: Text, radius: Text) -> Text:
    """t_sup = t + (v - t) / |v - t| * R: the text moved by R towards its video.

    Row i of video and radius is the pair of text i. The released code averages v over the texts."""
    return text + F.normalize(video - text, dim=-1) * radius


def matched(pairs: Float[Tensor, " n n *rest"]) -> Float[Tensor, " n *rest"]:
    """x[i, i]: the matched pairs of a batch in which text i belongs to video i."""
    return torch.diagonal(pairs).movedim(-1, 0)


# -------------------------------------------------------------------------------------------- the whole model
class TMASS(nn.Module):
    """CLIP, a psi of FUSIONS and an R of RADII ("none": no mass). Raises ValueError for a name not listed."""

    def __init__(
        self,
        clip: nn.Module,
        fusion: str = "xpool",
        radius: str = "linear",
        num_frames: int = 12,
        heads: int = 1,
        dropout: float = 0.3,
        initial_radius: float = 1.0,
    ):
        super().__init__()
        for what, key, keys in (("fusion", fusion, FUSIONS), ("radius", radius, ["none", *RADII])):
            if key not in keys:
                raise ValueError(f"unknown {what} {key!r}: choose {', '.join(keys)} or list it in model.py.")
        dim = clip.text_projection.shape[1]
        self.arguments = dict(fusion=fusion, radius=radius, num_frames=num_frames, heads=heads)
        self.arguments |= dict(dropout=dropout, initial_radius=initial_radius)
        self.clip = clip
        self.fusion = FUSIONS[fusion](dim, heads=heads, dropout=dropout)
        self.radius = None if radius == "none" else RADII[radius](num_frames, dim, initial=initial_radius)

    logit_scale = property(lambda self: self.clip.logit_scale)  # log(1 / tau), CLIP's learned temperature
    resolution = property(lambda self: self.clip.visual.input_resolution)  # pixels a side of phi_v's frames

    def encode_text(self, tokens: Int[Tensor, "texts tokens"]) -> Text:
        """t = phi_t(caption), not normalised: the transformer's output at the end mark, the largest token."""
        clip = self.clip
        x = clip.token_embedding(tokens) + clip.positional_embedding[: tokens.shape[1]]
        x = clip.transformer(x.transpose(0, 1)).transpose(0, 1)  # (texts, tokens, width)
        end = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
        with torch.autocast(x.device.type, enabled=False):
            return clip.ln_final(end.float()) @ clip.text_projection.float()

    def encode_frames(self, images: Float[Tensor, "videos frames 3 height width"]) -> Frames:
        """f_i = phi_v(frame i), each frame by itself, not normalised."""
        return self.clip.encode_image(images.flatten(0, 1)).float().unflatten(0, images.shape[:2])

    def save_pretrained(self, folder, **more) -> None:
        """Writes model.safetensors, config.json, README.md into a folder (engine/checkpoint.py)."""
        importlib.import_module("engine.checkpoint").save_pretrained(self, folder, **more)

    def push_to_hub(self, name: str, **more) -> str:
        """Sends that folder to the Hugging Face Hub as user/name (engine/checkpoint.py)."""
        return importlib.import_module("engine.checkpoint").push_to_hub(self, name, **more)

    @staticmethod
    def from_pretrained(folder, revision: str | None = None) -> "TMASS":
        """The model in that folder, or of user/name on the Hub, on the CPU, in eval mode."""
        return importlib.import_module("engine.checkpoint").from_pretrained(folder, revision)


# Moved to engine/ and still importable from here; imported on first use, so this file can be copied alone.
MOVED = {"ModelError": "engine.files", "load_clip": "engine.backbone", "load_file": "engine.backbone"}
MOVED |= dict.fromkeys(("load_checkpoint", "save_checkpoint", "build_from_checkpoint"), "engine.checkpoint")


def __getattr__(name: str):
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(MOVED[name]), name)
