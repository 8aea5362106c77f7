"""The package: it builds, installs beside programs that have a model.py of their own, and needs no checkout.

The build uses the setuptools of this environment, and the installed package uses the other packages of it, so
nothing is downloaded.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "engine").glob("*.py"))]
BUILD = "import sys, setuptools.build_meta as backend; print(backend.build_{}(sys.argv[1]))"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def ran(*command, cwd: Path, text: str | None = None) -> str:
    """What a command prints. A command that fails ends the test."""
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=cwd, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist made of a copy of the files that are packed, and the wheel made of that sdist."""
    work = tmp_path_factory.mktemp("build")
    (work / "copy").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, work / "copy")
    for name in ("tmass", "engine", "assets"):
        shutil.copytree(ROOT / name, work / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = work / "dist"
    sdist = ran(sys.executable, "-c", BUILD.format("sdist"), folder, cwd=work / "copy").split()[-1]
    with tarfile.open(folder / sdist) as archive:
        archive.extractall(work, filter="data")
    unpacked = work / sdist.removesuffix(".tar.gz")
    wheel = ran(sys.executable, "-c", BUILD.format("wheel"), folder, cwd=unpacked).split()[-1]
    return folder / sdist, folder / wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """bin/ of a new environment with the wheel, which sees the other packages of this environment."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    folder = home / "bin"
    ran(*PIP, "--python", folder / "python", "install", "--no-index", "--no-deps", built[1], cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    there = Path(pytest.__file__).parent.parent
    (packages / "others.pth").write_text(f"{there}\n")
    return folder


def test_the_wheel_holds_the_modules_unchanged_the_tiny_clip_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        flat = {name.removeprefix("tmass/flat/"): wheel.read(name) for name in names if "/flat/" in name}
    expected = {str(path.relative_to(ROOT)) for path in MODULES}
    expected |= {"engine/page.html", "assets/tiny_clip.safetensors"}
    assert flat.keys() == expected and names - {f"tmass/flat/{name}" for name in flat} == {
        "tmass/__init__.py"
    }
    assert [name for name, content in flat.items() if content != (ROOT / name).read_bytes()] == []


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", "tmass/__init__.py", "engine/page.html"} <= names


PROGRAM = """
import contextlib, importlib, importlib.metadata, io, json, sys
import data, model
import tmass
from tmass.engine.backbone import load_clip
from tmass.model import TMASS, load_checkpoint, load_clip as moved
modules = sys.argv[1:]
for name in modules:
    importlib.import_module(f"tmass.{name}")
assert data.MINE and model.MINE and tmass.train.data is tmass.data and moved is load_clip
found = TMASS(load_clip("tiny"), num_frames=4)
found.save_pretrained("saved")
assert TMASS.from_pretrained("saved").arguments == found.arguments
helps = {}
for command in importlib.metadata.entry_points(group="console_scripts"):
    if command.name.startswith("tmass-"):
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            command.load()(["--help"])
        helps[command.name] = printed.getvalue()
names = {name.split(".")[0] for name in modules}
print(json.dumps([helps, sorted(name for name in sys.modules if name.split(".")[0] in names)]))
"""


def test_installed_modules_work_in_a_folder_with_a_model_and_a_data_of_its_own(installed, tmp_path):
    """All of them are imported, the tiny CLIP is found, and their bare names stay the program's."""
    for name in ("model", "data"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.stem[0] != "_"
    ]
    helps, bare = json.loads(ran(installed / "python", "program.py", *names, cwd=tmp_path).splitlines()[-1])
    assert bare == ["data", "model"] and helps.keys() == PROJECT["scripts"].keys()
    assert [command for command, text in helps.items() if "usage: " not in text] == []


def test_a_command_runs_in_an_empty_folder(installed, tmp_path):
    assert "tmass-data check" in ran(installed / "tmass-data", "check", "--help", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert {path.name for path in installed.glob("tmass-*")} == PROJECT["scripts"].keys()


def test_every_command_is_that_of_a_stage_file():
    assert PROJECT["scripts"] == {
        f"tmass-{name}": f"tmass.{name}:main" for name in ("train", "evaluate", "search", "data")
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_uses_only_the_forms_of_import_that_the_package_prefixes(path):
    """`import engine.files` would bind the bare name engine; a relative import would fail in a checkout."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("engine.")]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level


# ----------------------------------------------------------------------------------------------- versions


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def ranges(lines: list[str]) -> dict[str, Requirement]:
    return {(found := Requirement(line)).name: found for line in lines}


def test_the_pinned_versions_are_inside_the_ranges_of_the_package():
    extras = PROJECT["optional-dependencies"]
    for lines, file in (
        (PROJECT["dependencies"] + extras["dev"], "requirements.txt"),
        (extras["search"], "requirements-search.txt"),
    ):
        known, pinned = ranges(lines), pins(file)
        assert known.keys() == pinned.keys()
        assert [name for name, version in pinned.items() if version not in known[name].specifier] == []


def test_the_lock_file_holds_the_pinned_versions_and_public_addresses():
    lock = (ROOT / "uv.lock").read_text()
    locked = {package["name"]: package.get("version") for package in tomllib.loads(lock)["package"]}
    pinned = pins("requirements.txt") | pins("requirements-search.txt")
    assert {name: locked[name] for name in pinned} == pinned
    hosts = set(re.findall(r"https?://([^/\"]+)", lock))
    assert hosts == {"pypi.org", "files.pythonhosted.org"} and "file://" not in lock
    assert {
        name for extra in PROJECT["optional-dependencies"].values() for name in ranges(extra)
    } <= locked.keys()
