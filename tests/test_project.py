"""What holds the project together: pins, the conda way, the order of the modules, the README's words."""

import ast
import re

import pytest
from conftest import ROOT

import data
import evaluate
import reproduce
import search
import train

ORDER = ["shapes", "data", "model", "losses", "evaluate", "train", "reproduce", "search"]


def test_conda_installs_what_pip_installs():
    environment = (ROOT / "environment.yml").read_text()
    assert "      - -r requirements.txt\n" in environment and "git+https://github.com/openai/CLIP.git" in environment
    python = re.search(r"- python=(\d+\.\d+)", environment)[1]
    assert f'requires-python = ">={python}"' in (ROOT / "pyproject.toml").read_text()
    assert f"PYTHON ?= python{python}" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-search.txt"])
def test_every_requirement_has_an_exact_pin(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines if line)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_never_imports_one_that_comes_later(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    if module == "data":  # but for its command line: `data.py cache --features` needs a model
        tree.body = [node for node in tree.body if getattr(node, "name", None) != "cache"]
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported.isdisjoint(ORDER[ORDER.index(module) :])
    assert module != "model" or "data" not in imported  # these two know nothing of each other


@pytest.mark.parametrize("module", ORDER)
def test_everything_public_says_what_it_is(module):
    for node in ast.parse((ROOT / f"{module}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"


def test_flags_that_the_readme_names_exist(capsys):
    known = {"-k"}
    programs = [
        (train, []),
        (evaluate, []),
        (reproduce, []),
        (data, ["check"]),
        (data, ["cache"]),
        *((search, [c]) for c in ("index", "query", "check", "serve")),
    ]
    for program, command in programs:
        with pytest.raises(SystemExit) as ended:
            program.main([*command, "--help"])
        assert ended.value.code == 0
        known |= set(re.findall(r"--[a-z][a-z-]+|--M", capsys.readouterr().out))
    commands = re.findall(r"python (?:train|evaluate|data|search|reproduce)\.py[^`\n]*", (ROOT / "README.md").read_text())
    assert len(commands) > 5
    named = {flag for command in commands for flag in re.findall(r"--[A-Za-z][A-Za-z-]*", command)}
    assert named <= known


def test_search_needs_its_own_packages_only_when_it_opens_a_library():
    tree = ast.parse((ROOT / "search.py").read_text())
    imported = {name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for name in (a.name for a in node.names)}
    lines = (ROOT / "requirements-search.txt").read_text().splitlines()
    optional = {line.split("==")[0].removesuffix("-headless").replace("-", "_") for line in lines}
    assert "pymilvus" in optional and imported.isdisjoint(optional)
