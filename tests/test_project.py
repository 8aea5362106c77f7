"""What holds the project together: the order of its modules, their sizes, the copyable files, the pins."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# A module imports only from rows above its own. engine.datasets comes before the two that use its records.
ROWS = [
    ["engine.files", "engine.intervals", "losses", "model", "shapes"],
    [
        "engine.distributed",
        "engine.weights",
        "engine.metrics",
        "engine.scoring",
        "engine.plots",
        "engine.controls",
        "engine.queries",
        "engine.shards",
        "engine.milvus",
    ],
    [
        "engine.analysis",
        "engine.backbone",
        "engine.pictures",
        "engine.ffmpeg",
        "engine.tables",
        "engine.uneven",
        "engine.folder",
        "engine.hub",
        "engine.masses",
        "engine.firstpass",
    ],
    ["engine.video", "engine.finding", "engine.cutting"],
    ["engine.datasets", "engine.scenes"],
    ["engine.frames", "engine.config", "engine.parts"],
    ["data", "engine.checkpoint", "engine.paper_tables"],
    ["engine.features", "engine.optim", "engine.experiment", "engine.fast_training"],
    ["engine.tiny_clip", "engine.library", "evaluate", "train"],
    ["reproduce", "engine.searcher", "engine.server", "mteb_model"],
    ["engine.indexing"],
    ["search"],
]
ROW = {module: number for number, row in enumerate(ROWS) for module in row}
BUDGETS = {"model": 230, "losses": 110, "data": 300, "train": 350, "evaluate": 300}
CONSTANTS = (ast.Dict, ast.Tuple, ast.List, ast.Call)  # dict(...) is a table too
COPYABLE = ["model", "losses", "engine/scoring", "engine/metrics"]


def source(module: str) -> str:
    return (ROOT / f"{module.replace('.', '/')}.py").read_text()


def imports(module: str) -> set[str]:
    """The modules that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_its_row():
    there = {path.stem for path in ROOT.glob("*.py")}
    there |= {f"engine.{path.stem}" for path in (ROOT / "engine").glob("*.py")} - {"engine.__init__"}
    assert there == set(ROW)


@pytest.mark.parametrize("module", ROW)
def test_a_module_imports_only_from_rows_above_its_own(module):
    ours = {name for name in imports(module) if name in ROW}
    assert {name for name in ours if ROW[name] >= ROW[module]} == set()


def test_the_copyable_files_import_only_each_other_torch_numpy_and_jaxtyping():
    known = {"torch", "numpy", "jaxtyping", "model", "losses"} | sys.stdlib_module_names
    for module in COPYABLE:
        tree = ast.parse(source(module))
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} <= known, module


def test_best_of_M_inference_runs_from_four_copied_files(tmp_path):
    for module in COPYABLE:
        shutil.copy(ROOT / f"{module}.py", tmp_path)
    code = """
import torch, types
from metrics import retrieval_metrics
from model import LinearRadius, XPool
from scoring import noise_bank, scores
texts, videos, frames, dim = 9, 6, 4, 16
model = types.SimpleNamespace(fusion=XPool(dim), radius=LinearRadius(frames, dim))
text, frames = torch.randn(texts, dim), torch.randn(videos, frames, dim)
found = scores(model, text, frames, noise_bank(20, dim, seed=0))
assert found.shape == (texts, videos)
print(sorted(retrieval_metrics(found, torch.arange(texts) % videos)))
"""
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout == "['t2v', 'v2t']\n", ran.stderr


def test_the_stage_files_stay_small():
    lines = {module: len(source(module).splitlines()) for module in BUDGETS}
    assert sum(lines.values()) <= 1350, lines
    assert {module: n for module, n in lines.items() if n > 1.1 * BUDGETS[module]} == {}


def test_no_file_is_longer_than_600_lines():
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    there = [ROOT / name for name in files if (ROOT / name).exists()]
    assert {path.name: n for path in there if (n := len(path.read_text().splitlines())) > 600} == {}


@pytest.mark.parametrize("module", ROW)
def test_everything_public_says_what_it_is(module):
    tree = ast.parse(source(module))
    assert ast.get_docstring(tree), module
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"


@pytest.mark.parametrize("module", ROW)
def test_only_tables_of_constants_are_formatted_by_hand(module):
    text, tables = source(module), set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, CONSTANTS):
            tables.add(node.end_lineno)
    by_hand = {n for n, line in enumerate(text.splitlines(), start=1) if "# fmt: skip" in line}
    assert by_hand <= tables


# ----------------------------------------------------------------------------------------------- installation


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines if line)
    return dict(line.split("==") for line in lines if line)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-search.txt"])
def test_every_requirement_has_an_exact_pin(name):
    assert pins(name)


def test_conda_installs_what_pip_installs():
    environment = (ROOT / "environment.yml").read_text()
    assert "      - -r requirements.txt\n" in environment
    assert "git+https://github.com/openai/CLIP.git" in environment
    python = re.search(r"- python=(\d+\.\d+)", environment)[1]
    assert f'requires-python = ">={python}' in (ROOT / "pyproject.toml").read_text()
    assert f"python{python}" in (ROOT / "Makefile").read_text()


def test_search_needs_its_own_packages_only_when_it_opens_a_library():
    optional = {name.removesuffix("-headless").replace("-", "_") for name in pins("requirements-search.txt")}
    for module in ("search", "engine.library", "engine.server"):
        body = ast.parse(source(module)).body
        imported = {a.name.split(".")[0] for node in body if isinstance(node, ast.Import) for a in node.names}
        assert "pymilvus" in optional and imported.isdisjoint(optional)
