"""Frame-pooled CLIP, X-Pool and T-MASS as models of MTEB, and a command that runs its tasks (docs/mteb.md).

    python mteb_model.py --arch ViT-B/32                     # the mean of CLIP's frames, nothing trained
    python mteb_model.py --checkpoint runs/msrvtt-tmass      # what train.py wrote

FramePooledCLIP is an encoder: a text or video is one vector. X-Pool and T-MASS are not, because psi and R
read text and frames of a pair together; PairScorer has MTEB's SearchProtocol instead (index, search). Videos
are decoded and encoded as in evaluate.py, so a model has the same R@1 in both. mteb is imported only when it
is used."""

import argparse
import functools
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from data import center_crop, normalise
from engine.backbone import autocast, load_clip, tokenize
from engine.checkpoint import open_checkpoint
from engine.config import EvaluationConfig, check_config, method_of, prior_of
from engine.datasets import Clip
from engine.distributed import choose_device
from engine.files import DataError, ModelError
from engine.frames import FrameCache
from engine.scoring import noise_bank, scores
from model import TMASS

OPENAI = {"ViT-B/32": "openai/clip-vit-base-patch32", "ViT-B/16": "openai/clip-vit-base-patch16"}
# MTEB's tasks with the videos of a data set that a run may have been trained on.
TASKS = {
    **{name: {"MSRVTTT2V", "MSRVTTV2T"} for name in ("msrvtt", "msrvtt-7k", "msrvtt-full")},
    "msvd": {"MSVDT2VRetrieval", "MSVDV2TRetrieval"},
    "vatex": {"VATEXT2VRetrieval", "VATEXV2TRetrieval"},
    "didemo": {"DiDeMoT2VRetrieval", "DiDeMoV2TRetrieval"},
}


def import_mteb() -> ModuleType:
    """Imports the package mteb and returns it. Raises ModelError if that fails."""
    try:
        import mteb
    except ImportError as error:
        raise ModelError(f'mteb cannot be imported ({error}): pip install ".[mteb]".') from None
    return mteb


# --------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def encode_texts(model: TMASS, texts: Sequence[str], batch: int) -> Float[Tensor, "texts dim"]:
    """t of each text, on the model's device."""
    tokens = tokenize(texts, model.clip.context_length).to(model.logit_scale.device)
    with autocast(tokens.device, "auto"):
        return torch.cat([model.encode_text(part) for part in tokens.split(8 * batch)])


@torch.no_grad()
def encode_videos(model: TMASS, rows: Sequence[dict], batch: int) -> Float[Tensor, "videos frames dim"]:
    """f_i of each video, by the frames that evaluate.py takes. Raises DataError for one that cannot be read.

    A row has the video's "bytes", or None and its "path"."""
    size, device, found = model.resolution, model.logit_scale.device, []
    for start in range(0, len(rows), batch):
        with tempfile.TemporaryDirectory() as folder:
            clips = []
            for number, row in enumerate(rows[start : start + batch], start=start):
                path = Path(row["path"] or "video.mp4")
                if row["bytes"] is not None:
                    path = Path(folder, f"{number}{path.suffix}")
                    path.write_bytes(row["bytes"])
                clips.append(Clip(str(number), path, (), "test"))
            cache = FrameCache(Path(folder), model.arguments["num_frames"], size)
            for number, reason in cache.fill(clips).items():
                raise DataError(f"video {number} of the task cannot be read: {reason}")
            frames = [torch.from_numpy(cache.frames(clip)).permute(0, 3, 1, 2) for clip in clips]
        images = torch.stack([center_crop(images, size) for images in frames])
        with autocast(device, "auto"):
            found.append(model.encode_frames(normalise(images.to(device))))
    return torch.cat(found)


def encode(model: TMASS, dataset, batch: int) -> tuple[str, Tensor]:
    """("video", frames) or ("text", t) of a Hugging Face data set; a title goes before its text."""
    if "video" in dataset.column_names:
        from datasets import Video

        rows = dataset.cast_column("video", Video(decode=False))["video"]
        return "video", encode_videos(model, rows, batch)
    turns = (x if isinstance(x, list) else [x] for x in dataset["text"])  # of a conversation
    texts = ["; ".join(x["content"] if isinstance(x, dict) else x for x in each) for each in turns]
    if "title" in dataset.column_names:
        texts = [f"{title or ''} {text}".strip() for title, text in zip(dataset["title"], texts)]
    return "text", encode_texts(model, texts, batch)


def single_vectors(features: Tensor) -> Float[Tensor, "rows dim"]:
    """t as it is; of frames the mean of f_i / |f_i|, which is MeanPool's v."""
    return F.normalize(features, dim=-1).mean(dim=1) if features.dim() == 3 else features


# ----------------------------------------------------------------------------------------------------- models


class FramePooledCLIP:
    """CLIP as MTEB's encoder: t for a text, the mean of f_i / |f_i| for a video, compared by their cosine."""

    def __init__(self, model: TMASS, **fields):
        self.model, self.fields = model.eval(), fields

    @functools.cached_property
    def mteb_model_meta(self):
        """MTEB's ModelMeta of this model."""
        return model_meta(self.model, **self.fields)

    def encode(self, inputs, *, batch_size: int = 32, **_):
        """One vector for each row of a DataLoader's data set, a numpy array (rows, dim)."""
        return single_vectors(encode(self.model, inputs.dataset, batch_size)[1]).cpu().numpy()

    def similarity(self, embeddings1, embeddings2) -> Float[Tensor, "rows others"]:
        """The cosine of every pair."""
        one, other = (torch.atleast_2d(torch.as_tensor(x)) for x in (embeddings1, embeddings2))
        return F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T

    def similarity_pairwise(self, embeddings1, embeddings2) -> Float[Tensor, " rows"]:
        """The cosine of row i with row i."""
        return F.cosine_similarity(torch.as_tensor(embeddings1), torch.as_tensor(embeddings2), dim=-1)


class PairScorer:
    """X-Pool and T-MASS as MTEB's SearchProtocol: the score of a text and a video is the best of M draws.

    Two texts, or two videos, which a task may also compare, get the cosine of `single_vectors`."""

    def __init__(self, model: TMASS, trained: dict, M: int = 20, **fields):
        self.model, self.fields = model.eval(), fields
        prior = prior_of(EvaluationConfig(), trained, trained.get("dataset", ""))
        draws = M if model.radius is not None else 0
        self.noise = noise_bank(draws, model.clip.text_projection.shape[1], EvaluationConfig.seed, **prior)

    @functools.cached_property
    def mteb_model_meta(self):
        """MTEB's ModelMeta of this model."""
        return model_meta(self.model, **self.fields)

    def index(self, corpus, *, encode_kwargs: dict, **_) -> None:
        """Encodes the documents, which are videos or texts."""
        self.names, self.documents = (
            list(corpus["id"]),
            encode(self.model, corpus, encode_kwargs["batch_size"]),
        )

    def search(
        self, queries, *, top_k: int, encode_kwargs: dict, top_ranked: dict | None = None, **_
    ) -> dict[str, dict[str, float]]:
        """{query: {document: score}} of a query's best top_k documents, or of those in top_ranked[query]."""
        encoded = encode(self.model, queries, encode_kwargs["batch_size"])
        features = {kind: found for kind, found in (encoded, self.documents)}
        if len(features) == 2:
            found = scores(self.model, features["text"], features["video"], self.noise)
            found = found if encoded[0] == "text" else found.T
        else:
            queried, indexed = (F.normalize(single_vectors(x), dim=-1) for _, x in (encoded, self.documents))
            found = queried @ indexed.T
        column, results = {name: k for k, name in enumerate(self.names)}, {}
        for query, row in zip(queries["id"], found.cpu()):
            columns = torch.tensor(
                [column[name] for name in (top_ranked[query] if top_ranked else self.names)]
            )
            best, places = row[columns].topk(min(top_k, len(columns)))
            results[query] = dict(zip((self.names[k] for k in columns[places].tolist()), best.tolist()))
        return results


# ------------------------------------------------------------------------------------------- what to evaluate


def model_meta(model: TMASS | None = None, **fields):
    """MTEB's ModelMeta, which its leaderboard shows. Sizes are those of `model`, where it is given."""
    known = dict.fromkeys(("loader", "release_date", "embed_dim", "training_datasets", "reference"))
    known |= dict.fromkeys(
        ("public_training_code", "public_training_data", "n_parameters", "memory_usage_mb")
    )
    known |= dict(
        languages=["eng-Latn"], max_tokens=77, license=None, open_weights=True, framework=["PyTorch"]
    )
    known |= dict(modalities=["text", "video"], similarity_fn_name="cosine", use_instructions=False)
    if model is not None:
        count = sum(parameter.numel() for parameter in model.parameters())
        known |= dict(n_parameters=count, memory_usage_mb=round(4 * count / 2**20))
        known |= dict(max_tokens=model.clip.context_length)
    import_mteb()
    from mteb.models import ModelMeta

    return ModelMeta(**{**known, **fields})


def clip_fields(arch: str) -> dict:
    """The fields of ModelMeta of frame-pooled CLIP, one of OPENAI."""
    fields = dict(name=f"tmass/clip-mean-{_plain(arch)}", revision="12-frames", embed_dim=512)
    return dict(fields, release_date="2021-02-26", adapted_from=OPENAI[arch])


def clip_metas() -> list:
    """The ModelMetas of frame-pooled CLIP, ViT-B/32 and ViT-B/16; `load_model()` needs mteb[video]."""

    def loader(arch: str, *_, device: str = "auto", **__) -> FramePooledCLIP:
        return open_clip_model(arch, device)

    return [model_meta(loader=functools.partial(loader, arch), **clip_fields(arch)) for arch in OPENAI]


def open_clip_model(arch: str, device: str = "auto") -> FramePooledCLIP:
    """Frame-pooled CLIP of 12 frames; arch: as load_clip takes it. Raises ModelError."""
    model = TMASS(load_clip(arch), "mean", "none").to(choose_device(device))
    fields = clip_fields(arch) if arch in OPENAI else dict(name=f"tmass/clip-mean-{_plain(arch)}")
    return FramePooledCLIP(model, **{"revision": "12-frames", **fields})


def open_run(path: Path | str, M: int = 20, device: str = "auto") -> FramePooledCLIP | PairScorer:
    """The model of a run, a checkpoint or a folder of save_pretrained. Raises ModelError.

    Its revision is a hash of the file. It counts as trained on MTEB's tasks with its data set's videos."""
    model, trained, file = open_checkpoint(Path(path))
    model, parts = model.to(choose_device(device)), model.arguments
    method = method_of(parts["fusion"], parts["radius"])
    words = [method, _plain(trained.get("arch", "clip")), trained.get("dataset", "released")]
    fields = dict(
        name=f"tmass/{'-'.join(words)}", revision=hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    )
    fields |= dict(adapted_from=OPENAI.get(trained.get("arch")), license="mit")
    fields |= dict(
        training_datasets=TASKS.get(trained.get("dataset"), set()) if "dataset" in trained else None
    )
    if method == "clip":
        return FramePooledCLIP(model, embed_dim=model.clip.text_projection.shape[1], **fields)
    if method == "tmass" and M != 20:
        fields |= dict(experiment_kwargs={"M": M})
    return PairScorer(model, trained, M, **fields)


def _plain(arch: str) -> str:
    """ViT-B/32 -> vit-b-32; of the path of a file, its name."""
    return (arch if arch in OPENAI else Path(arch).stem).lower().replace("/", "-")


# ----------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Anything wrong with the input ends it with one sentence and exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="a run of train.py, or a checkpoint")
    what.add_argument("--arch", help="frame-pooled CLIP: ViT-B/32, ViT-B/16")
    parser.add_argument("--tasks", nargs="+", default=["MSRVTTT2V"], help="names of MTEB's tasks")
    parser.add_argument("--M", type=int, default=20, help="texts drawn for each pair (T-MASS)")
    parser.add_argument("--out", type=Path, default=Path("mteb-results"), help="folder of the results")
    parser.add_argument("--batch", type=int, default=32, help="videos encoded at once")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    try:
        check_config(EvaluationConfig(M=given.M, batch=given.batch))
        mteb = import_mteb()
        run = functools.partial(open_run, given.checkpoint, given.M) if given.checkpoint else None
        model = (run or functools.partial(open_clip_model, given.arch))(device=given.device)
        try:
            tasks = mteb.get_tasks(tasks=given.tasks)
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"mteb has no such task ({error}): choose one of mteb's retrieval tasks."
            ) from None
        options = dict(encode_kwargs={"batch_size": given.batch}, cache=mteb.ResultCache(given.out))
        found = mteb.evaluate(model, tasks, **options)
    except (DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # of the download of a task's data
        sys.exit(f"error: the data of a task cannot be read ({error}).")
    for result in found.task_results:
        print(report(result))
    print(f"written: {given.out}")


def report(result) -> str:
    """The line of a task: R@1, R@5, R@10 in percent, and MTEB's main score."""
    (row,) = result.scores["test"]
    recall = "  ".join(f"R@{k} {100 * row[f'recall_at_{k}']:.1f}" for k in (1, 5, 10))
    return f"{result.task_name}: {recall}  main score {100 * row['main_score']:.1f}"


if __name__ == "__main__":
    main()
