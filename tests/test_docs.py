"""The documents: links, commands, flags and numbers are right, and the examples of CONTRIBUTING.md run."""

import contextlib
import functools
import io
import re
import shutil
import subprocess
import sys
import types
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randn, small_clip
from test_project import COPYABLE, ROWS

import data
import engine.datasets
import evaluate
import losses
import model
import reproduce
import search
import train
from engine import config
from engine.files import ModelError

DOCS = [ROOT / f"{name}.md" for name in ("README", "RESULTS", "CONTRIBUTING", "CHANGELOG")]
DOCS += sorted((ROOT / "docs").glob("*.md"))
README, RESULTS, CONTRIBUTING = (DOCS[k].read_text() for k in range(3))
each_document = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)

# A command of ours in a document, `python FILE REST` or `torchrun --ITS-OWN FLAGS FILE REST`: (FILE, REST).
COMMAND = re.compile(r"(?:python|torchrun(?: --[a-z-]+ \S+)*) ([\w/]+\.py)([^`#\n&|;]*)")
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
COMMANDS = {"data.py": ("check", "cache"), "search.py": ("index", "query", "check", "serve")}
PROGRAMS = (train, evaluate, reproduce, data, search)
MAINS = {f"{program.__name__}.py": program for program in PROGRAMS}
OTHERS = {
    "--save_memory_mode",
    "--nproc-per-node",
    "--toy",
}  # of the released code, torchrun, benchmarks/gpu.py


def text_of(path: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", path.read_text())


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ (.*)$", text_of(path)):
        kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
        found.add("".join(kept).replace(" ", "-"))
    return found


@functools.cache
def help_of(script: str, command: str = "") -> str:
    """What `script command --help` prints; of a script with argparse, its source, which names its flags."""
    if script not in MAINS:
        return (ROOT / script).read_text()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        MAINS[script].main([*command.split(), "--help"])
    assert ended.value.code in (0, None)
    return printed.getvalue()


def commands(path: Path) -> list[tuple[str, str]]:
    """Every command of ours in a document: (file, the rest of it)."""
    return COMMAND.findall(path.read_text())


# ---- links


@each_document
def test_every_relative_link_leads_to_a_file_and_every_anchor_to_a_heading(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_readme_leads_to_every_document_and_notebook():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    others = [path for path in DOCS[1:] if path.stem not in ("CHANGELOG", "history")]
    expected = [str(path.relative_to(ROOT)) for path in [*notebooks, *others]]
    assert [name for name in expected if f"({name}" not in README] == []


# ---- commands and flags


@each_document
def test_every_command_names_a_file_that_exists(path):
    assert [script for script, _ in commands(path) if not (ROOT / script).is_file()] == []
    for name in re.findall(r"pip install -r ([\w.-]+)", path.read_text()):
        assert (ROOT / name).is_file(), name


@each_document
def test_every_make_target_exists(path):
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"(?m)(?:`|^)make ([a-z]+)", path.read_text())) <= targets


@each_document
def test_every_flag_of_a_command_is_in_its_help(path):
    for script, rest in commands(path):
        words = rest.split()
        command = words[0] if script in COMMANDS and words and words[0] in COMMANDS[script] else ""
        if script in COMMANDS and not command:
            continue  # the program by name alone
        known = set(FLAG.findall(help_of(script, command))) | {"--help"}
        assert set(FLAG.findall(rest)) <= known, (script, rest)


@each_document
def test_every_flag_that_is_named_is_one_of_ours(path):
    known = {"--help"} | OTHERS
    for script in MAINS:
        for command in COMMANDS.get(script, ("",)):
            known |= set(FLAG.findall(help_of(script, command)))
    inline = re.findall(r"`(--[^`]*)`", text_of(path))
    assert {flag for code in inline for flag in FLAG.findall(code)} <= known


@pytest.mark.parametrize("name", ["dataset", "fusion", "radius", "recipe", "method", "score", "pairs"])
def test_every_choice_that_the_documents_name_exists(name):
    program = evaluate if name == "score" else train
    listed = re.search(rf"--{name}\s*\{{([^}}]*)\}}", help_of(f"{program.__name__}.py").replace("│", " "))[1]
    known = {choice.strip() for choice in re.sub(r"\s", "", listed).split(",")}
    for path in DOCS:
        spans = re.findall(r"`[^`]+`", path.read_text())
        code = " ".join([*spans, *(rest for _, rest in commands(path))])
        named = set(re.findall(rf"--{name} ([a-z][\w-]*)", code))
        examples = {"mine", "max", "capped"} if path.name == "CONTRIBUTING.md" else set()
        assert named <= known | examples, path.name


# ---- form


def test_the_readme_is_short_and_its_tables_are_narrow():
    assert len(README.splitlines()) <= 160
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert rows and max(row.count("|") - 1 for row in rows) <= 7


@each_document
def test_no_document_names_a_path_of_one_machine(path):
    assert not re.findall(r"(?<![\w.~/])/(?:work|home|root|tmp|Users|mnt)/", path.read_text())


@pytest.mark.parametrize("name", ["README.md", "docs/leak.md"])
def test_every_mean_and_interval_is_one_of_results(name):
    numbers = re.findall(r"\d+\.\d ± \d+\.\d|[+-]\d+\.\d \[[^\]]*\]", (ROOT / name).read_text())
    assert numbers and [number for number in numbers if number not in RESULTS] == []


def test_every_claim_of_results_quotes_its_tables():
    claims, tables = RESULTS.split("## How to reproduce")[0], (ROOT / "docs" / "tables.md").read_text()
    numbers = re.findall(r"\d+\.\d ± \d+\.\d|[+-]\d+\.\d \[[^\]]*\]", claims)
    assert numbers and [number for number in numbers if number not in tables] == []


# ---- the examples of CONTRIBUTING.md


def example(heading: str, file: str) -> str:
    """The first block of a section that begins with `# FILE`."""
    section = CONTRIBUTING.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(rf"(?ms)^```python\n# {re.escape(file)}\n(.*?)^```$", section)[1]


def test_the_table_of_rows_is_that_of_the_imports():
    table = re.findall(r"(?m)^\| (\d+) \| (.*) \|$", CONTRIBUTING)
    assert [(int(row), modules.split(", ")) for row, modules in table] == list(enumerate(ROWS, start=1))


def test_the_example_of_copied_files_runs_beside_them(tmp_path):
    for module in COPYABLE:
        shutil.copy(ROOT / f"{module}.py", tmp_path)
    (tmp_path / "yours.py").write_text(example("Copy the inference", "yours.py"))
    command = [sys.executable, "-W", "error", "yours.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and "torch.Size([6, 4])" in ran.stdout and "'R@1'" in ran.stdout, ran.stderr


@pytest.mark.parametrize(
    "heading, parts", [("A new radius R", ("xpool", "capped")), ("A new fusion ψ", ("max", "linear"))]
)
def test_the_example_of_a_new_part_is_built_and_scored(heading, parts, monkeypatch):
    names = dict(vars(model))
    exec(example(heading, "model.py"), names)
    for registry in ("FUSIONS", "RADII"):
        for name, kind in names[registry].items():
            monkeypatch.setitem(getattr(model, registry), name, kind)
    own = model.TMASS(small_clip(), *parts, num_frames=4).eval()
    text, frames, noise = randn(5, 24), randn(3, 4, 24, seed=1), randn(6, 24, seed=2)
    warned = pytest.warns(UserWarning, match="fast form") if "max" in parts else contextlib.nullcontext()
    with torch.no_grad(), warned:
        fast = evaluate.scores(own, text, frames, noise)
        literal = evaluate.scores_literal(own, text, frames, noise)
    assert torch.allclose(fast, literal, atol=2e-5)


def test_the_example_of_a_new_loss_has_a_gradient_and_a_weight(monkeypatch):
    names = dict(vars(losses))
    exec(example("A new loss", "losses.py"), names)
    assert names["LOSSES"].keys() - losses.LOSSES.keys() == {"L_R"}
    monkeypatch.setitem(losses.LOSSES, "L_R", names["radius_loss"])
    weights = config.loss_weights(config.Config()) | {"L_s": 0.0, "L_sup": 0.0, "L_R": 1.0}
    radius = (2 * torch.rand(3, 3, 8) + 0.5).requires_grad_()
    symbols = dict(text=randn(3, 8), video=randn(3, 3, 8), radius=radius)
    loss, parts = losses.tmass_loss(weights, scale=10.0, **symbols)
    loss.backward()
    assert parts.keys() == {"L_R"} and radius.grad[0, 0].any() and not radius.grad[0, 1].any()


def test_the_weight_of_a_new_loss_goes_into_the_config_as_the_example_says(monkeypatch):
    own = types.ModuleType("own_config")
    monkeypatch.setitem(sys.modules, "own_config", own)  # dataclasses look their module up
    parts = re.split(r"(?m)^# \d\. .*\n", example("A new loss", "engine/config.py"))[1:]
    field, limits, weights = (f"{part.rstrip()}\n" for part in parts)
    source = (ROOT / "engine" / "config.py").read_text()
    before = weights.replace(', "L_R": 0.0', "").replace(', "L_R": config.shrink', "")
    ranges = re.search(r"(?ms)^RANGES.*?^}", source)[0]
    edits = {
        "    M: int = 20": f"{field}    M: int = 20",
        ranges: f"{ranges[:-1]}{limits}}}",
        before: weights,
    }
    for old, new in edits.items():
        assert old in source
        source = source.replace(old, new, 1)
    exec(source, vars(own))
    assert own.loss_weights(own.Config(shrink=0.5)) == config.loss_weights(config.Config()) | {"L_R": 0.5}
    assert own.loss_weights(own.Config(radius="none"))["L_R"] == 0.0
    with pytest.raises(ModelError, match="--shrink -1"):
        own.check_config(own.Config(shrink=-1))


def test_the_example_of_a_new_data_set_reads_its_clips(tmp_path):
    names = dict(vars(engine.datasets))
    try:
        exec(example("A new data set", "engine/datasets.py"), names)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "captions.json").write_text(
            '[{"id": "a", "file": "a.mp4", "captions": ["a dog runs"], "split": "train"}]'
        )
        (clip,) = engine.datasets.read_clips("mine", tmp_path)
        assert (clip.id, clip.captions, clip.split) == ("a", ("a dog runs",), "train")
    finally:
        engine.datasets.DATASETS.pop("mine", None)
