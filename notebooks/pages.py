"""Runs the notebooks and writes each as a web page, docs/notebooks/NAME.html, for readers without Python.

    python notebooks/pages.py                  # make pages: all notebooks
    python notebooks/pages.py 03_text_mass     # one of them

A page holds its plots, compressed. It needs only MathJax for the equations, which the browser loads. Its head
has two hashes. "source" is the hash of the notebook; a test compares them, so no page is older than its
notebook. "content" is the hash of everything shown, except the output of cells with the tag "clock" (times,
speeds). A page with the same hashes is not written again, so a second run changes no file.
"""

import base64
import hashlib
import html
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from PIL import Image
from pygments.formatters import HtmlFormatter

FOLDER = Path(__file__).resolve().parent
PAGES = FOLDER.parent / "docs" / "notebooks"
NO_DESCRIPTION = "No description has been provided for this image"  # nbconvert's text for screen readers

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="source" content="{source}">
<meta name="content" content="{content}">
<title>{title}</title>
<script>
MathJax = {{tex: {{inlineMath: [["$", "$"]]}}, chtml: {{scale: 1.08, matchFontHeight: false}}}};
</script>
<script async src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml.js"></script>
<style>
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
body {{ font: 16px/1.55 system-ui, sans-serif; }}
h1, h2 {{ line-height: 1.25; }} h2 {{ margin-top: 2.2rem; border-top: 1px solid #ddd; padding-top: 1rem; }}
a {{ color: #0072b2; }} .anchor-link {{ display: none; }}
pre, code {{ font: 13.5px/1.45 ui-monospace, monospace; }} p code, li code, td code {{ background: #f4f4f2; }}
h2 code {{ font-size: 1em; }}
.highlight pre, .jp-RenderedText pre {{ margin: .4rem 0; padding: .6rem .8rem; overflow-x: auto; }}
.highlight pre {{ background: #f7f7f5; border-left: 3px solid #c9c9c4; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .25rem .7rem; border: 1px solid #ddd; }}
th:empty {{ display: none; }} nav {{ font-size: 14px; }}
img {{ max-width: 100%; height: auto; display: block; margin: .4rem 0; }} summary {{ cursor: pointer; }}
{highlight}
</style>
</head>
<body>
<nav>{links}</nav>
"""


def notebooks() -> list[Path]:
    """All notebooks, in the order of their numbers."""
    return sorted(FOLDER.glob("*.ipynb"))


def source_hash(path: Path) -> str:
    """A hash of the type and text of every cell of a notebook, whatever its outputs."""
    cells = nbformat.read(path, as_version=4).cells
    return _hash(*(f"{cell.cell_type}\n{cell.source}" for cell in cells))


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def compress(png: bytes) -> tuple[str, bytes]:
    """(MIME type, content) of a picture: PNG with 256 colours, or JPEG if that is less than half as large."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    palette, jpeg = io.BytesIO(), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(palette, "PNG", optimize=True)
    picture.save(jpeg, "JPEG", quality=85, optimize=True)
    if 2 * jpeg.tell() < palette.tell():
        return "image/jpeg", jpeg.getvalue()
    return "image/png", palette.getvalue()


def run(path: Path) -> NotebookNode:
    """The notebook with its outputs, from a run in its own folder. Raises CellExecutionError if a cell fails.

    Progress bars and warnings (stderr) are left out, and so are the names of temporary folders."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    temporary = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+")
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "stream" and output.name == "stdout":
                output.text = temporary.sub("...", output.text)
                if kept and "text" in kept[-1]:  # a progress bar in between had split it
                    kept[-1].text += output.text
                else:
                    kept.append(output)
            elif "image/png" in data:
                kind, content = compress(base64.b64decode(data["image/png"]))
                output.data = NotebookNode({kind: base64.b64encode(content).decode()})
                kept.append(output)
        cell.outputs, cell.execution_count = kept, None
    return notebook


def page(path: Path, notebook: NotebookNode) -> str:
    """The page of a notebook that was run."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # the key figure is already above
            cell.source = re.sub(r"\n!\[.*\Z", "", cell.source, flags=re.S)
            cell.source = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.html)", cell.source)
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    body = exporter.from_notebook_node(notebook)[0].replace(NO_DESCRIPTION, "Plot of the cell above")
    shown = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "code" and "clock" not in cell.metadata.get("tags", []):
            shown += [str(output.get("text") or output.get("data")) for output in cell.outputs]
    names = [other.stem for other in notebooks()]
    links = " · ".join(name if name == path.stem else f'<a href="{name}.html">{name}</a>' for name in names)
    title = html.escape(re.search(r"# (.*)", notebook.cells[0].source)[1])
    style = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    style = "\n".join(line for line in style.splitlines() if line.startswith(".highlight ."))
    head = HEAD.format(source=source_hash(path), content=_hash(HEAD, *shown), title=title,
                       links=links, highlight=style)  # fmt: skip
    return head + body + "\n</body>\n</html>\n"


def write(path: Path) -> None:
    """Writes the page of a notebook, if it would show something new."""
    target, content = PAGES / f"{path.stem}.html", page(path, run(path))
    hashes = re.findall(r'<meta name="(?:source|content)" content="\w+">', content)
    old = target.read_text(encoding="utf-8") if target.is_file() else ""
    current = all(line in old for line in hashes)
    if not current:
        PAGES.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")
    size = target.stat().st_size / 2**20
    print(f"docs/notebooks/{target.name}: {size:.2f} MiB{', unchanged' if current else ''}", flush=True)


def main() -> None:
    """Writes the pages of the notebooks named on the command line, or of all."""
    known = {path.stem: path for path in notebooks()}
    if unknown := [name for name in sys.argv[1:] if name not in known]:
        sys.exit(f"there is no notebook {unknown[0]}: choose from {', '.join(known)}.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("TMASS_FIGURES", None)
    for name in sys.argv[1:] or known:
        write(known[name])


if __name__ == "__main__":
    main()
