"""Controls of the text mass: the layer of JointRadius used without a mass (`reproduce.py --table controls`).

Each is a psi (--fusion NAME --radius none): it pools as X-Pool does, and then changes the score of a pair. So
it trains and is scored like any other psi. h = gelu(W_t t' + W_v v') is the layer of JointRadius, with t' and
v' at length sqrt(dim). Its W_o starts near 0, so every control starts as X-Pool.

    video-moved    cos(t, v + W_o h)                          X-Pool, with as many parameters as the others
    text-moved     cos(t + |t| W_o h / sqrt(dim), v)          the text moves, but is one point
    number         cos(t, v) + w . h                          a number of the pair is added to the score
    text-number    cos(t, v) + w . gelu(W_t t')               a number of the text alone, without the video
    dispersion     cos(t, v) - lambda d,  d = 1 - |mean_i f_i / |f_i||     one learned number
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from losses import cosine_scores
from model import FUSIONS, Frames, Pairs, Text, XPool


def dispersion(frames: Frames) -> Float[Tensor, " videos"]:
    """1 - |mean_i f_i / |f_i||: 0 where all frames of a video have the same direction, at most 1."""
    return 1 - F.normalize(frames, dim=-1).mean(dim=1).norm(dim=-1)


def with_cosine(text: Text, video: Pairs, cosine: Float[Tensor, "texts videos"]) -> Pairs:
    """v turned in the plane of t and v, so that cos(t, v) is the given number (limited to -1 .. 1), |v| = 1.

    A score in the form of a psi: what reads v reads this number, and nothing else of the change."""
    t, c = F.normalize(text, dim=-1)[:, None], cosine.clamp(-1 + 1e-6, 1 - 1e-6)[..., None]
    across = F.normalize(video - (video * t).sum(dim=-1, keepdim=True) * t, dim=-1)
    return c * t + (1 - c.square()).sqrt() * across


class Control(XPool):
    """X-Pool's psi, and `added`: the part that is trained at the rate of R. A subclass defines `change`."""

    added: nn.Module
    out_dim: int | None = None  # of the layer; default: dim
    reads_video = True

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.3):
        super().__init__(dim, heads, dropout)
        self.added = nn.ModuleDict({"text": nn.Linear(dim, dim)})
        if self.reads_video:
            self.added["video"] = nn.Linear(dim, dim, bias=False)
        self.added["out"] = nn.Linear(dim, self.out_dim or dim, bias=False)
        nn.init.normal_(self.added["out"].weight, std=1e-3)

    def forward(self, text: Text, frames: Frames) -> Pairs:
        """v of every pair, changed."""
        return self.change(text, frames, super().forward(text, frames))

    def change(self, text: Text, frames: Frames, video: Pairs) -> Pairs:
        """v after the change."""
        raise NotImplementedError

    def layer(self, text: Text, video: Pairs) -> Float[Tensor, "texts _ out"]:
        """W_o gelu(W_t t' + W_v v'); one for all videos if the layer does not read them."""
        t, v = (F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 for x in (text[:, None], video))
        hidden = self.added["text"](t)
        return self.added["out"](F.gelu(hidden + self.added["video"](v) if self.reads_video else hidden))


class VideoMoved(Control):
    """cos(t, v + W_o h)."""

    def change(self, text: Text, frames: Frames, video: Pairs) -> Pairs:
        return video + self.layer(text, video)


class TextMoved(Control):
    """cos(t + |t| W_o h / sqrt(dim), v)."""

    def change(self, text: Text, frames: Frames, video: Pairs) -> Pairs:
        length = text.norm(dim=-1)[:, None, None] / text.shape[1] ** 0.5
        moved = text[:, None] + length * self.layer(text, video)
        return with_cosine(text, video, cosine_scores(moved, video))


class Number(Control):
    """cos(t, v) + w . h."""

    out_dim = 1

    def change(self, text: Text, frames: Frames, video: Pairs) -> Pairs:
        return with_cosine(text, video, cosine_scores(text, video) + self.layer(text, video).squeeze(-1))


class TextNumber(Number):
    """cos(t, v) + w . gelu(W_t t'): equal for all videos, so it changes video-to-text ranks only."""

    reads_video = False


class Dispersion(Control):
    """cos(t, v) - lambda d; lambda starts at 0."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.3):
        super().__init__(dim, heads, dropout)
        self.added = nn.ParameterDict({"weight": torch.zeros(())})

    def change(self, text: Text, frames: Frames, video: Pairs) -> Pairs:
        cosine = cosine_scores(text, video) - self.added["weight"] * dispersion(frames)
        return with_cosine(text, video, cosine)


CONTROLS: dict[str, type[Control]] = {
    "video-moved": VideoMoved, "text-moved": TextMoved, "number": Number, "text-number": TextNumber,
    "dispersion": Dispersion,
}  # fmt: skip
FUSIONS.update(CONTROLS)
