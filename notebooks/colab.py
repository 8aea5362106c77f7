"""Gives every notebook its Colab badge, and a first cell that fetches the repository there.

    python notebooks/colab.py      # after the address in pyproject.toml, [tool.tmass], has changed

The badge opens the notebook from the repository. While the address is unknown, it opens Colab, and REPOSITORY
is filled in by hand. A notebook that has both already is not changed.
"""

import json
import tomllib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
COLAB = "https://colab.research.google.com"
BADGE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"
CELL = """# In Colab this cell fetches the repository and installs its packages. Elsewhere it does nothing.
import os
import subprocess
import sys

REPOSITORY = "{}"  # its address, https://github.com/OWNER/NAME
if "google.colab" in sys.modules:
    assert REPOSITORY, "fill in REPOSITORY, the address of the repository"
    fetch = f"test -d /content/tmass || git clone {{REPOSITORY}} /content/tmass"
    subprocess.run(f"({{fetch}}) && pip install -q /content/tmass", shell=True, check=True)
    os.chdir("/content/tmass/notebooks")"""


def address() -> str:
    """The address of the repository, from pyproject.toml; "" if it is not known."""
    text = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["tool"]["tmass"]["repository"]


def badge(name: str, repository: str) -> str:
    """The line with the badge of notebook `name`."""
    if not repository:
        return f"{BADGE}({COLAB}/) (upload this notebook there, and fill in `REPOSITORY` below)"
    where = repository.removeprefix("https://github.com/")
    return f"{BADGE}({COLAB}/github/{where}/blob/main/notebooks/{name}.ipynb)"


def with_colab(notebook: dict, name: str, repository: str) -> dict:
    """A notebook with the badge below its title and the cell before its first code cell."""
    title, *cells = notebook["cells"]
    lines = [line for line in "".join(title["source"]).split("\n\n") if not line.startswith(BADGE)]
    text = "\n\n".join([lines[0], badge(name, repository), *lines[1:]])
    cells = [cell for cell in cells if "colab" not in cell["metadata"].get("tags", [])]
    first = dict(cell_type="code", execution_count=None, id=f"{name[:2]}-colab", metadata={"tags": ["colab"]})
    first |= dict(outputs=[], source=CELL.format(repository).splitlines(keepends=True))
    title = {**title, "source": text.splitlines(keepends=True)}
    return {**notebook, "cells": [title, first, *cells]}


def main() -> None:
    """Rewrites the notebooks whose badge or cell is not that of the address."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        old = path.read_text(encoding="utf-8")
        new = (
            json.dumps(with_colab(json.loads(old), path.stem, address()), indent=1, ensure_ascii=False) + "\n"
        )
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"notebooks/{path.name}: badge and first cell; run make pages.")


if __name__ == "__main__":
    main()
