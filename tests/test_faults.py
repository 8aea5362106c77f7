"""FAULTS.md: each kind of fault that real files and machines have caused has tests, and they exist."""

import ast
import functools
import re

import pytest
from conftest import ROOT

CASES = ROOT.parent / "shared" / "cases"
ROWS = re.findall(r"(?m)^\| (?!fault|---)(.+?) \| (.+) \|$", (ROOT / "tests" / "FAULTS.md").read_text())


@functools.cache
def functions(file: str) -> set[str]:
    """The names of all functions in a test file."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault, tests", ROWS, ids=[fault for fault, _ in ROWS])
def test_the_tests_of_a_fault_exist(fault, tests):
    named = re.findall(r"`(\w+\.py)::(\w+)", tests)
    assert named and all(function in functions(file) for file, function in named)


def test_every_case_has_a_row():
    if not CASES.is_dir():
        pytest.skip(f"no cases at {CASES}")
    known = " ".join(fault for fault, _ in ROWS)
    assert [path.name for path in sorted(CASES.iterdir()) if path.is_dir() and path.name not in known] == []
