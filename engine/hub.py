"""The Hugging Face Hub: the card of a model, and the way of its folder to the Hub and back.

The folder is that of PyTorchModelHubMixin: config.json, model.safetensors, README.md. engine/checkpoint.py
writes and opens it. huggingface_hub is imported only when a model is sent or fetched."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from engine.files import ModelError, first_line
from engine.metrics import table
from engine.weights import MISMATCH

Answer = TypeVar("Answer")
FILES = ["config.json", "model.safetensors", "README.md"]


# ---------------------------------------------------------------------------------------------- send, fetch


def import_hub() -> ModuleType:
    """Imports the package huggingface_hub and returns it. Raises ModelError if that fails."""
    try:
        import huggingface_hub
    except ImportError as error:
        what = f"the Hub needs huggingface_hub, which cannot be imported ({error})"
        raise ModelError(f"{what}: pip install huggingface_hub, or name a folder.") from None
    return huggingface_hub


def is_name(name: str) -> bool:
    """Whether a text can be the name of a model on the Hub: user/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def check_name(name: str) -> None:
    """Raises ModelError for a text that cannot be the name of a model on the Hub."""
    if not is_name(name):
        raise ModelError(f"{name!r} is no name of a model on the Hub: give user/name.")


def fetch(name: str, revision: str | None = None) -> Path:
    """Downloads config and weights of user/name, or finds them in the cache. Returns their folder.

    revision: a branch, tag or commit; default: the newest. Raises ModelError."""
    download = import_hub().snapshot_download
    what = f"{name} is no folder here, and could not be fetched from the Hub"
    return Path(_asked(lambda: download(name, revision=revision, allow_patterns=FILES[:2]), what))


def send(folder: Path, name: str, private: bool | None = None) -> str:
    """Uploads the three files of a folder to user/name in one commit. Returns its address.

    A missing user/name is created; private: None leaves that to the account. Raises ModelError."""
    api = import_hub().HfApi(library_name="tmass")
    what = f"{name} could not be sent to the Hub"
    _asked(lambda: api.create_repo(name, private=private, exist_ok=True), what)
    options = dict(folder_path=folder, allow_patterns=FILES, commit_message="Upload a model of T-MASS")
    return str(_asked(lambda: api.upload_folder(repo_id=name, **options), what))


def _asked(call: Callable[[], Answer], what: str) -> Answer:
    """Returns what a call of huggingface_hub returns. Raises ModelError: `what`, and the reason.

    Its errors, and those of the network libraries below it, have no common class."""
    try:
        return call()
    except Exception as error:
        reason = first_line(error).rstrip(".: ")
        advice = "check the name, the network, and the login (hf auth login)"
        raise ModelError(f"{what} ({reason}): {advice}.") from None


# ------------------------------------------------------------------------------------------- what is public

# Of a config: all but these, which name files and hardware of the machine.
PRIVATE = {"out", "resume", "data", "annotations", "videos", "device", "workers"}
# Of results.json, and of the flags in it.
RESULT = "name dataset split texts videos missing M prior seed metrics machine".split()
FLAGS = "captions score noise dsl amp".split()
CLIP = re.compile(r"tiny|(?:ViT|RN)[\w@/-]*")  # --arch, if it is no file
OPENAI = {
    "ViT-B/32": "openai/clip-vit-base-patch32", "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14", "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}  # fmt: skip


def public_config(config: dict) -> dict:
    """Returns a recorded config without paths. Of a file of weights its name is left."""
    kept = {name: value for name, value in config.items() if name not in PRIVATE}
    for name in {"arch", "weights"} & kept.keys():
        if kept[name] is not None and not CLIP.fullmatch(str(kept[name])):
            kept[name] = Path(kept[name]).name
    return kept


def facts(file: Path) -> dict:
    """Returns what the folder of a checkpoint tells of it: {"clips": their numbers, "results": the metrics}.

    results.json counts only if it was measured with this file; a warning says so otherwise. Raises ModelError
    for files that train.py and evaluate.py do not write."""
    data, results, found = file.with_name("data.json"), file.with_name("results.json"), {}
    try:
        if (path := data).is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            found["clips"] = {"training": content["train"], "validation": len(content["val"])}
            found["clips"]["unreadable"] = len(content["skipped"])
        if (path := results).is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            with file.open("rb") as stream:
                own = hashlib.file_digest(stream, "sha256").hexdigest() == content["sha256"]
            if own and content["config"]["protocol"] == "paper":
                found["results"] = {name: content[name] for name in RESULT}
                found["results"] |= {name: content["config"][name] for name in FLAGS}
            else:
                what = f"{results} is of other weights than {file.name}, or of the protocol that leaks"
                warnings.warn(f"{what}: the card leaves it out.", stacklevel=2)
    except MISMATCH as error:
        what = f"{path} is not as train.py or evaluate.py writes it ({first_line(error)})"
        raise ModelError(f"{what}: evaluate again, or remove it.") from None
    return found


# --------------------------------------------------------------------------------------------------- the card

MARK = "<!-- Written anew whenever the model is saved. Remove this line to keep your changes. -->"
CARD = """---
{head}---
{MARK}

# {title}

A model of text-video retrieval: it scores captions with videos. CLIP: {clip}; ψ: {fusion}; R: {radius};
{num_frames} frames a video. Made with `tmass`, a reimplementation of "Text Is MASS: Modeling as Stochastic
Embedding for Text-Video Retrieval" (CVPR 2024) that is not by the authors of the paper.

## Use

```python
from tmass.model import TMASS  # in the repository: from model import TMASS

model = TMASS.from_pretrained("FOLDER")  # this folder, or user/name on the Hub
```

## Results

{results}

## Training

{training}

## Licence

{license_text} The code is under MIT. The videos and captions of a data set have terms of their own.

## Citation

```bibtex
@inproceedings{{wang2024text,
  title     = {{Text Is MASS: Modeling as Stochastic Embedding for Text-Video Retrieval}},
  author    = {{Wang, Jiamian and Sun, Guohao and Wang, Pichao and Liu, Dongfang and Dianat, Sohail and
               Rabbani, Majid and Rao, Raghuveer and Tao, Zhiqiang}},
  booktitle = {{Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)}},
  pages     = {{16551--16560}},
  year      = {{2024}}
}}
```
"""


def may_replace(card: Path) -> bool:
    """Whether a README.md is missing, or was generated and not edited since."""
    return not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace")


def model_card(content: dict, name: str) -> str:
    """Returns the card of a folder, README.md, from the content of its config.json.

    name: of the method, as in tables. Metrics are those of content["results"], measured by evaluate.py, and
    of content["val"]; without results it says "not evaluated". Its head is YAML, for the Hub."""
    config, results = content.get("config", {}), content.get("results")
    clip = config.get("weights") or config.get("arch", "not recorded")
    named = config.get("weights") is None and CLIP.fullmatch(clip)  # OpenAI's and the tiny one are under MIT
    license_name = content.get("license") or ("mit" if named else "unknown")
    head = {"library_name": "tmass", "license": license_name, "pipeline_tag": "feature-extraction"}
    head["tags"] = ["text-video-retrieval", "video-retrieval", "clip"]
    if named and clip in OPENAI:
        head["base_model"] = OPENAI[clip]
    if results:
        head["model-index"] = [{"name": name, "results": _index(results)}]
    own = "not given" if license_name == "unknown" else license_name
    return CARD.format(
        MARK=MARK,
        head="".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()),  # JSON is YAML
        title=f"{name}, trained on {config['dataset']}" if "dataset" in config else name,
        clip=clip,
        **{part: content["arguments"][part] for part in ("fusion", "radius", "num_frames")},
        results=_results(results) + (_validation(content["val"]) if content.get("val") else ""),
        training=_training(content, config),
        license_text=f"These weights: {own}. Those of the CLIP that they started from have their own.",
    )


def _index(results: dict) -> list[dict]:
    """Results in the form of the Hub's model-index: an entry for each direction."""
    dataset = {"name": results["dataset"], "type": results["dataset"], "split": results["split"]}
    entries = []
    for way, words in (("t2v", "text-to-video retrieval"), ("v2t", "video-to-text retrieval")):
        found = [{"type": kind, "value": round(x, 2)} for kind, x in results["metrics"][way].items()]
        named = [{**metric, "name": f"{metric['type']} ({results['name']})"} for metric in found]
        entries.append({"task": {"type": "retrieval", "name": words}, "dataset": dataset, "metrics": named})
    return entries


def _results(results: dict | None) -> str:
    """The table of an evaluation and how it was made, or that there was none."""
    if results is None:
        return "Not evaluated: no results of evaluate.py for these weights."
    sizes = f"{results['texts']} captions, {results['videos']} videos, {results['missing']} videos left out"
    prior = f"{results['prior']['prior']}, std {results['prior']['std']:g}"
    draws = f"M = {results['M']} draws (noise {prior}; seed {results['seed']})"
    draws = draws if results["M"] else "no draws"
    flags = ", ".join(f"{name} {results[name]}" for name in FLAGS)
    head = f"{results['dataset']}, {results['split']} split: {sizes}; {draws}; {flags}. One training run."
    return f"{head}\nMachine: {results['machine']}.\n\n{table({results['name']: results['metrics']})}"


def _validation(val: dict) -> str:
    """The table of the validation that chose the checkpoint."""
    head = "Validation split, by which this checkpoint was chosen; not a test result:"
    return f"\n\n{head}\n\n{table({'validation': val})}"


def _training(content: dict, config: dict) -> str:
    """Data set, split, seed, code and settings of the training, as far as they are recorded."""
    if "dataset" not in config:
        return "Not recorded." + (" A checkpoint of the released code." if config.get("released") else "")
    clips = ", ".join(f"{count} {what}" for what, count in content.get("clips", {}).items())
    rows = {"data set": f"{config['dataset']}, training split", "clips": clips or None}
    rows |= {"validation (`--val`)": config.get("val"), "seed": config.get("seed")}
    rows |= {name: content.get(name) for name in ("step", "commit", "machine")}
    lines = [f"* {name}: {'not recorded' if x is None else x}" for name, x in rows.items()]
    settings = [f"{name}: {value}" for name, value in sorted(config.items())]
    return "\n".join([*lines, "", "```", *settings, "```"])
