"""Every notebook runs from top to bottom, from its own folder, saves its key figure, and is committed without outputs. Together they speak of
all that is public in model.py and losses.py, and copy none of it."""

import ast
import json
import re

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, random_model
from nbclient import NotebookClient

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MODULES = ["shapes", "data", "model", "losses", "evaluate", "train"]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def definitions(code: str) -> list[ast.AST]:
    """Functions and classes at the top level of a module or cell, and the methods of the classes."""
    kinds = ast.FunctionDef | ast.ClassDef
    top = [node for node in ast.parse(code).body if isinstance(node, kinds)]
    return top + [node for owner in top if isinstance(owner, ast.ClassDef) for node in owner.body if isinstance(node, kinds)]


def lines_of(code: str) -> list[str]:
    """Lines without comments, docstrings, blanks and imports, as ast writes them: spaces and quotes make no difference."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return [line.strip() for line in ast.unparse(tree).splitlines() if line.strip() and not re.match(r"\s*(import|from) ", line)]


def runs_of(lines: list[str], length: int = 4) -> set[tuple[str, ...]]:
    return {tuple(lines[k : k + length]) for k in range(len(lines) - length + 1)}


@each_notebook
def test_notebook_runs_and_saves_its_key_figure(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TMASS_FIGURES", str(tmp_path))
    before = path.read_bytes()
    NotebookClient(nbformat.read(path, as_version=4), timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert path.read_bytes() == before
    assert [picture.name for picture in tmp_path.iterdir()] == [f"{path.stem}.png"]


@each_notebook
def test_notebook_is_committed_without_outputs(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@each_notebook
def test_notebook_ends_with_three_exercises_folded_answers_and_its_key_figure(path):
    last = cells(path, "markdown")[-1]
    questions, answers = last.split("<details>")
    assert re.findall(r"^(\d)\.", questions, re.M) == re.findall(r"^(\d)\.", answers, re.M) == ["1", "2", "3"]
    assert f"](../assets/{path.stem}.png)" in answers and (ROOT / "assets" / f"{path.stem}.png").is_file()


@each_notebook
def test_every_step_of_a_notebook_checks_itself_and_says_what_to_see_and_try(path):
    source = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(path.read_text())["cells"]]
    steps = [k for k, (text, kind) in enumerate(source) if kind == "markdown" and re.match(r"## \d", text)]
    assert len(steps) >= 5
    for k in steps:
        (code, kind), (after, _) = source[k + 1 : k + 3]
        assert kind == "code" and "assert " in code, source[k][0].splitlines()[0]
        assert "**See:**" in after and "**Try:**" in after


@each_notebook
def test_links_of_a_notebook_lead_to_files(path):
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(cells(path, "markdown")))
    assert links and all((path.parent / link).exists() for link in links if not link.startswith("http"))


@pytest.mark.parametrize("module", ["model", "losses"])
def test_notebooks_mention_everything_public(module):
    words = set(re.findall(r"\w+", "\n".join(text for path in NOTEBOOKS for kind in ("code", "markdown") for text in cells(path, kind))))
    public = {node.name for node in definitions((ROOT / f"{module}.py").read_text()) if not node.name.startswith("_")} - {"forward"}
    assert len(public) > 2 and public <= words


@each_notebook
def test_notebook_copies_no_code_of_the_modules(path):
    modules = [(ROOT / f"{module}.py").read_text() for module in MODULES]
    names = {node.name for code in modules for node in definitions(code)}
    code = "\n".join(cells(path, "code"))
    assert names.isdisjoint(node.name for node in definitions(code))
    assert not runs_of(lines_of(code)) & set().union(*(runs_of(lines_of(module)) for module in modules))


def test_a_copy_would_be_found():
    """The test above can fail: losses.py itself, in other clothes, is found in losses.py."""
    code = (ROOT / "losses.py").read_text()
    dressed = "\n".join(f"{line}  # mine" if line.endswith(":") else line for line in code.splitlines())
    assert runs_of(lines_of(code)) & runs_of(lines_of(dressed))


def test_the_sample_is_small_and_is_the_run_that_it_was_made_of(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import sample

    from model import save_checkpoint

    assert sample.FILE.stat().st_size < 2_000_000
    model = random_model(frames=4)
    save_checkpoint(tmp_path / "run" / "best.pt", model, config={"prior": "normal"})
    monkeypatch.setattr(sample, "FILE", tmp_path / "assets" / "tiny.npz")
    sample.FILE.parent.mkdir()
    monkeypatch.setattr(sample, "ROOT", tmp_path)
    sample.pack(tmp_path / "run")
    packed, clips = sample.load(), sample.clips(3)
    assert packed.arguments == model.arguments and packed.about["config"] == {"prior": "normal"}
    original, features = sample.encode(model, clips, 2), sample.encode(packed, clips, 2)
    assert features.text.shape == (6, 24) and features.frames.shape == (3, 4, 24) and features.owner.tolist() == [0, 0, 1, 1, 2, 2]
    for ours, theirs in ((features.text, original.text), (features.frames, original.frames)):
        assert torch.cosine_similarity(ours, theirs, dim=-1).min() > 0.999  # 8 bits a weight


def test_pictures_of_the_sample_are_the_frames_that_the_cache_keeps(clips, monkeypatch):
    """Drawn here, rendered to H.264 and decoded there: the same moments."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import sample

    import shapes
    from data import decode_frames

    drawn = sample.pictures(shapes.make_clip(0, 2), 5).astype(int)
    assert np.abs(drawn - np.stack(decode_frames(clips[2].path, 5))).mean() < 4
