"""Notebooks: they run from top to bottom, save their key figure, and are committed without outputs.

Together they mention everything public in model.py and losses.py, and copy none of our code. Each has a page.
"""

import ast
import asyncio
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import shapes
from engine.backbone import load_clip
from engine.checkpoint import save_checkpoint, to_record
from engine.config import Config, EvaluationConfig, preset
from engine.files import ModelError
from engine.frames import decode_frames
from model import TMASS

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PAGES = ROOT / "docs" / "notebooks"
MODULES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "engine").glob("*.py"))]
OURS = {"engine", *(path.stem for path in [*ROOT.glob("*.py"), *FOLDER.glob("*.py")])}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[dict]:
    return [{**cell, "source": "".join(cell["source"])} for cell in json.loads(path.read_text())["cells"]]


def texts(path: Path, kind: str) -> list[str]:
    return [cell["source"] for cell in cells(path) if cell["cell_type"] == kind]


def definitions(code: str) -> list[ast.AST]:
    """Functions and classes at the top level of a module or cell, and the methods of the classes."""
    kinds = ast.FunctionDef | ast.ClassDef
    top = [node for node in ast.parse(code).body if isinstance(node, kinds)]
    classes = [node for node in top if isinstance(node, ast.ClassDef)]
    return top + [node for owner in classes for node in owner.body if isinstance(node, kinds)]


def lines_of(code: str) -> list[str]:
    """Lines as ast writes them, without comments, docstrings, blanks and imports."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    lines = [line.strip() for line in ast.unparse(tree).splitlines()]
    return [line for line in lines if line and not re.match(r"(import|from) ", line)]


def runs_of(lines: list[str], length: int = 4) -> set[tuple[str, ...]]:
    return {tuple(lines[k : k + length]) for k in range(len(lines) - length + 1)}


@pytest.fixture
def notebook_module(monkeypatch):
    """Imports a module of the folder notebooks by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(name)


# ---- the notebooks


# Before a notebook, its kernel forgets all names, our modules and the folder they are in. Only the start of
# the kernel and the imports of libraries are shared: they would be half the time.
AS_NEW = f"""
%reset -f
__import__("os").environ["TMASS_FIGURES"] = "FOLDER"
__import__("sys").path[:] = [path for path in __import__("sys").path if path not in ("..", {str(ROOT)!r})]
for _ in [name for name in __import__("sys").modules if name.split(".")[0] in {OURS}]:
    del __import__("sys").modules[_]
"""


@pytest.fixture(scope="session")
def kernel():
    """The first notebook starts it. Its imports, of two seconds, are here: other processes need them not."""
    from jupyter_client import AsyncKernelManager

    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    if manager.has_kernel:
        asyncio.run(manager.shutdown_kernel(now=True))


@pytest.mark.slow
@each_notebook
def test_notebook_runs_and_saves_its_key_figure(path, tmp_path, kernel):
    import nbformat
    from nbclient import NotebookClient

    before = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(AS_NEW.replace("FOLDER", str(tmp_path))))
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, km=kernel, timeout=120, resources=resources)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
    assert path.read_bytes() == before
    assert [picture.name for picture in tmp_path.iterdir()] == [f"{path.stem}.png"]


@each_notebook
def test_notebook_is_committed_without_outputs(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@each_notebook
def test_a_code_cell_has_at_most_12_lines_of_110_columns(path):
    for code in texts(path, "code"):
        lines = code.splitlines()
        assert len(lines) <= 12 and max(map(len, lines)) <= 110, code


@each_notebook
def test_only_style_py_calls_matplotlib(path):
    assert "matplotlib" not in "\n".join(texts(path, "code"))


@each_notebook
def test_notebook_ends_with_three_exercises_folded_answers_and_its_key_figure(path):
    last = texts(path, "markdown")[-1]
    questions, answers = last.split("<details>")
    numbers = [re.findall(r"^(\d)\.", text, re.M) for text in (questions, answers)]
    assert numbers == [["1", "2", "3"]] * 2
    assert f"](../assets/{path.stem}.png)" in answers and (ROOT / "assets" / f"{path.stem}.png").is_file()


@each_notebook
def test_a_step_checks_shapes_and_equality_and_says_what_to_see_and_try(path):
    """A step is a heading "## 1 ...", one or more code cells, and a text."""
    kinds, sources = zip(*((cell["cell_type"], cell["source"]) for cell in cells(path)))
    steps = [k for k, text in enumerate(sources) if kinds[k] == "markdown" and re.match(r"## \d", text)]
    assert len(steps) >= 5
    for k in steps:
        end = kinds.index("markdown", k + 1)
        asserted = re.findall(r"^ *assert (.*)", "\n".join(sources[k + 1 : end]), re.M)
        assert any(".shape" in line or "len(" in line for line in asserted), sources[k]
        other = [re.sub(r"\S*\.shape == \S+", "", line) for line in asserted]
        assert any(re.search(r"equal|close|==|<", line) for line in other) or k == steps[0], sources[k]
        assert "**See:**" in sources[end] and "**Try:**" in sources[end]


@each_notebook
def test_links_of_a_notebook_lead_to_files(path):
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(texts(path, "markdown")))
    assert links and all((path.parent / link).exists() for link in links if not link.startswith("http"))


@each_notebook
def test_files_that_a_notebook_names_exist(path):
    named = re.findall(r"`((?:\w+/)*\w+\.(?:py|npz))`", "\n".join(texts(path, "markdown")))
    assert all((ROOT / name).is_file() or (FOLDER / name).is_file() for name in named)


def test_flags_that_notebooks_name_exist():
    known = {
        field.name.replace("_", "-") for config in (Config, EvaluationConfig) for field in fields(config)
    }
    known |= {"features", "no-augment"}  # of data.py cache, and the negation of --augment
    every = "\n".join(
        text for path in NOTEBOOKS for kind in ("code", "markdown") for text in texts(path, kind)
    )
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", every))
    assert len(named) > 10 and named <= known


@pytest.mark.parametrize("module", ["model", "losses"])
def test_notebooks_mention_everything_public(module):
    every = "\n".join(
        text for path in NOTEBOOKS for kind in ("code", "markdown") for text in texts(path, kind)
    )
    names = {node.name for node in definitions((ROOT / f"{module}.py").read_text())}
    public = {name for name in names if not name.startswith("_")} - {"forward"}
    assert len(public) > 2 and public <= set(re.findall(r"\w+", every))


@functools.cache
def of_modules() -> tuple[set[str], set[tuple[str, ...]]]:
    """Names that our modules define, and the runs of their lines."""
    modules = [module.read_text() for module in MODULES]
    names = {node.name for code in modules for node in definitions(code)}
    return names, set().union(*(runs_of(lines_of(module)) for module in modules))


@each_notebook
def test_notebook_copies_no_code_of_the_modules(path):
    names, runs = of_modules()
    code = "\n".join(texts(path, "code"))
    assert names.isdisjoint(node.name for node in definitions(code))
    assert runs_of(lines_of(code)).isdisjoint(runs)


def test_a_copy_would_be_found():
    """The test above can fail: losses.py is found in a losses.py with other comments."""
    code = (ROOT / "losses.py").read_text()
    edited = "\n".join(f"{line}  # mine" if line.endswith(":") else line for line in code.splitlines())
    assert runs_of(lines_of(code)) & runs_of(lines_of(edited))


# ---- Colab


@each_notebook
def test_badge_and_first_cell_are_those_of_the_address_in_pyproject(path, notebook_module):
    colab, notebook = notebook_module("colab"), json.loads(path.read_text())
    assert colab.with_colab(notebook, path.stem, colab.address()) == notebook, "run python notebooks/colab.py"


def test_an_address_reaches_every_badge_and_cell_and_nothing_else(notebook_module):
    colab, notebook = notebook_module("colab"), json.loads(NOTEBOOKS[3].read_text())
    known = colab.with_colab(notebook, "03_text_mass", "https://github.com/OWNER/NAME")
    title, code = ("".join(cell["source"]) for cell in known["cells"][:2])
    assert "research.google.com/github/OWNER/NAME/blob/main/notebooks/03_text_mass.ipynb)" in title
    assert title.count("colab-badge") == 1 and 'REPOSITORY = "https://github.com/OWNER/NAME"' in code
    assert colab.with_colab(known, "03_text_mass", colab.address()) == notebook


@pytest.mark.parametrize("there", [True, False], ids=["in Colab", "elsewhere"])
def test_the_first_cell_fetches_the_repository_in_colab_and_does_nothing_elsewhere(
    there, monkeypatch, notebook_module
):
    done = []
    monkeypatch.setattr(subprocess, "run", lambda command, shell, check: done.append(command))
    monkeypatch.setattr(os, "chdir", done.append)
    if there:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(notebook_module("colab").CELL.format("https://github.com/OWNER/NAME"), {})
    clone = "git clone https://github.com/OWNER/NAME /content/tmass"
    run = f"(test -d /content/tmass || {clone}) && pip install -q /content/tmass"
    assert done == ([run, "/content/tmass/notebooks"] if there else [])


def test_the_first_cell_asks_for_an_address_that_is_not_known(monkeypatch, notebook_module):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    with pytest.raises(AssertionError, match="fill in REPOSITORY"):
        exec(notebook_module("colab").CELL.format(""), {})


# ---- their pages


@each_notebook
def test_each_notebook_has_a_page_made_from_it(path, notebook_module):
    page = (PAGES / f"{path.stem}.html").read_text(encoding="utf-8")
    source = notebook_module("pages").source_hash(path)
    assert f'<meta name="source" content="{source}">' in page, "the notebook has changed: run make pages"
    plots = len(re.findall(r"style\.key_figure", "\n".join(texts(path, "code"))))
    assert page.count('src="data:image/') > plots


def test_pages_are_of_these_notebooks_and_small():
    pages = list(PAGES.glob("*"))
    assert sorted(page.name for page in pages) == [f"{path.stem}.html" for path in NOTEBOOKS]
    assert sum(page.stat().st_size for page in pages) < 6_000_000


@each_notebook
def test_links_between_pages_lead_to_pages(path):
    links = re.findall(r'href="([^"#]+)"', (PAGES / f"{path.stem}.html").read_text(encoding="utf-8"))
    assert links and all((PAGES / link).is_file() for link in links if not link.startswith("http"))


def test_a_page_is_written_again_only_if_it_shows_something_new(tmp_path, monkeypatch, notebook_module):
    import nbformat

    pages = notebook_module("pages")
    monkeypatch.setattr(pages, "PAGES", tmp_path / "docs")
    path, page = tmp_path / "00_try.ipynb", tmp_path / "docs" / "00_try.html"

    def written(code: str, tags: list[str]) -> bytes:
        cell = nbformat.v4.new_code_cell(code, id="b", metadata={"tags": tags})
        cell.outputs = [nbformat.v4.new_output("stream", text=code)]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Try", id="a"), cell])
        cell.source = "print(...)"  # the notebook stays; what it prints differs
        nbformat.write(notebook, path)
        monkeypatch.setattr(pages, "run", lambda path: notebook)
        pages.write(path)
        return page.read_bytes()

    first = written("12 s", ["clock"])
    assert written("13 s", ["clock"]) == first  # a time is no reason
    assert written("13 s", []) != first
    assert written("R@1 13", []) != written("R@1 14", [])


def test_pictures_of_pages_are_compressed(notebook_module):
    import io

    from PIL import Image

    pages = notebook_module("pages")
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for array in (noise, np.full((60, 80, 3), 200, np.uint8)):
        png = io.BytesIO()
        Image.fromarray(array).save(png, "PNG")
        kind, content = pages.compress(png.getvalue())
        assert kind in ("image/png", "image/jpeg") and len(content) <= len(png.getvalue())
        assert Image.open(io.BytesIO(content)).size == (80, 60)


# ---- the sample


def test_the_sample_is_small_and_equals_the_run_it_was_packed_from(tmp_path, monkeypatch, notebook_module):
    sample = notebook_module("sample")
    assert sample.FILE.stat().st_size < 2_000_000
    model = TMASS(load_clip("tiny"), num_frames=4).eval()
    config = to_record(replace(preset("shapes", "tmass"), prior="uniform"))
    save_checkpoint(tmp_path / "run" / "best.pt", model, config=config)
    monkeypatch.setattr(sample, "FILE", tmp_path / "assets" / "tiny.safetensors")
    sample.pack(tmp_path / "run")
    packed = sample.load()
    assert packed.arguments == model.arguments and packed.about["config"]["prior"] == "uniform"
    for name, value in model.state_dict().items():
        assert torch.allclose(packed.state_dict()[name], value, rtol=1e-3, atol=1e-6), name  # float16
    features = sample.encode(packed, sample.clips(3), 2)
    assert features.text.shape == (6, 256) and features.frames.shape == (3, 4, 256)
    assert features.owner.tolist() == [0, 0, 1, 1, 2, 2]


def test_only_a_run_on_the_tiny_clip_can_be_the_sample(tmp_path, notebook_module):
    save_checkpoint(tmp_path / "best.pt", TMASS(load_clip("tiny").apply(_negate), num_frames=4), config={})
    with pytest.raises(ModelError, match="does not hold"):
        notebook_module("sample").pack(tmp_path)


def _negate(module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.neg_()


def test_the_shipped_sample_loads_as_the_paper_s_model(notebook_module):
    model = notebook_module("sample").load()
    assert (model.arguments["fusion"], model.arguments["radius"]) == ("xpool", "linear")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_pictures_of_the_sample_are_the_frames_in_the_cache(clips, notebook_module):
    """The sample draws them; the cache decodes them from H.264 files. Both show the same moments."""
    drawn = notebook_module("sample").pictures(shapes.make_clip(0, 2), 5).astype(int)
    assert np.abs(drawn - np.stack(decode_frames(clips[2].path, 5))).mean() < 4
