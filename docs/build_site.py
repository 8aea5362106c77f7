"""Gathers the pages of the site (make docs). It is a hook of mkdocs: mkdocs.yml names it.

Pages are README.md (the first one), the guides in docs/, the executed notebooks in docs/notebooks/, the
documents at the root, and one page of docstrings for each module. Their links are those of the repository;
links to files that the site lacks lead to the repository, if pyproject.toml knows its address.
"""

import ast
import posixpath
import re
import tomllib
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["tmass"][
    "repository"
]
GUIDES = ["training", "data", "inference", "search", "leak", "history"]  # the first ones; others come after
DOCUMENTS = ["RESULTS", "CONTRIBUTING", "CHANGELOG"]
STAGES = ["model", "losses", "data", "train", "evaluate"]
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)?(#[^)\s]*)?(?=\))")
CODE = re.compile(r"(?ms)(^```.*?^```$)")


def modules() -> list[str]:
    """Names of our modules: the stage files in the order of the paper, what is built on them, the engine."""
    others = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in STAGES)
    engine = sorted(path.stem for path in (ROOT / "engine").glob("*.py") if path.stem != "__init__")
    return [*STAGES, *others, *(f"engine.{name}" for name in engine)]


def notebooks() -> list[str]:
    """Names of the executed notebooks, in order."""
    return sorted(path.stem for path in (ROOT / "docs" / "notebooks").glob("*.html"))


def target(path: str) -> str | None:
    """The file of the site that shows a file of the repository; None if there is none."""
    path = path.rstrip("/")
    stem, extension = posixpath.splitext(path)
    if extension == ".py" and (name := stem.replace("/", ".")) in modules():
        return f"api/{name}.md"
    if path in ("engine", "notebooks"):
        return {"engine": "api/index.md", "notebooks": "notebooks/index.md"}[path]
    if path == "README.md":
        return "index.md"
    if stem in DOCUMENTS or extension == ".png":
        return path
    if stem.startswith("docs/notebooks/") or (stem.startswith("notebooks/") and extension == ".ipynb"):
        return f"notebooks/{posixpath.basename(stem)}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def rewritten(text: str, source: str, page: str) -> str:
    """A document with its links as the site needs them. `source` is its file, `page` that of the site."""

    def link(match: re.Match) -> str:
        path, anchor = match[1] or "", match[2] or ""
        if not path:
            return anchor
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        found = target(path)
        if found is None:
            return f"{REPOSITORY}/blob/main/{path}" if REPOSITORY else "#"
        return posixpath.relpath(found, posixpath.dirname(page) or ".") + anchor

    parts = CODE.split(text)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return re.sub(r"\[([^\]]*)\]\(#\)", r"\1", "".join(parts))  # a link that leads nowhere is text


# ---- the hooks of mkdocs, in the order in which it calls them


def on_config(config):
    """Writes the navigation. Guides that GUIDES does not name come after those."""
    there = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    guides = [name for name in GUIDES if name in there] + [name for name in there if name not in GUIDES]
    config.nav = [
        {"Home": "index.md"},
        {"Guides": [f"{name}.md" for name in guides]},
        {"Notebooks": ["notebooks/index.md", *(f"notebooks/{name}.md" for name in notebooks())]},
        {"Reference": ["api/index.md", *({name: f"api/{name}.md"} for name in modules())]},
        {"Project": [f"{name}.md" for name in DOCUMENTS]},
    ]
    if REPOSITORY:
        config.repo_url = REPOSITORY
    return config


def on_files(files: Files, config) -> Files:
    """Adds the pages and pictures that are not in docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {"index.md": "---\nhide: [navigation]\n---\n" + rewritten(readme, "README.md", "index.md")}
    for name in DOCUMENTS:
        pages[f"{name}.md"] = rewritten((ROOT / f"{name}.md").read_text("utf-8"), f"{name}.md", f"{name}.md")
    table = readme.split("\n## Notebooks\n")[1].split("\n## ")[0]
    pages["notebooks/index.md"] = "# Notebooks\n" + rewritten(table, "README.md", "notebooks/index.md")
    pages |= {f"notebooks/{name}.md": f"---\nhide: [toc]\n---\n# {title(name)}\n" for name in notebooks()}
    pages["api/index.md"] = "# Reference\n\n| module | |\n|---|---|\n" + "\n".join(
        f"| [`{name}`]({name}.md) | {summary(name)} |" for name in modules()
    )
    pages |= {f"api/{name}.md": f"# `{name}`\n\n::: {name}\n" for name in modules()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for path in sorted((ROOT / "assets").glob("*.png")):
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Rewrites the links of the guides."""
    if page.file.generated_by:
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_page_content(html: str, page, config, files) -> str:
    """Fills the page of a notebook: the body of its HTML file, which has no heading that the site knows."""
    path = ROOT / "docs" / f"{page.file.src_uri.removesuffix('.md')}.html"
    if not page.file.src_uri.startswith("notebooks/") or not path.is_file():
        return html
    body = path.read_text(encoding="utf-8").split("</nav>", 1)[1].split("</body>")[0]
    return f'<div class="notebook">{body}</div>'


def title(notebook: str) -> str:
    """The title of an executed notebook, without the signs of an equation."""
    page = (ROOT / "docs" / "notebooks" / f"{notebook}.html").read_text(encoding="utf-8")
    return re.search(r"<title>(.*)</title>", page)[1].replace("$", "")


def summary(module: str) -> str:
    """The first sentence of a module's docstring."""
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    first = re.split(r"(?<=\.)\s|\n\n", ast.get_docstring(ast.parse(source)))[0]
    return " ".join(first.split()).replace("|", "\\|")


class Docstrings(griffe.Extension):
    """Shows docstrings as the plain text they are, since the site would read them as markdown."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Rewrites the docstring of every object that is read, paragraph by paragraph."""
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(map(plain, obj.docstring.value.split("\n\n")))


def plain(paragraph: str) -> str:
    """A paragraph of a docstring in markdown that shows it as it is.

    Columns and indented lines become a block of code. Code in backticks stays code."""
    if re.search(r"\S {3,}\S|^ +\S", paragraph, re.M):
        deeper = "" if paragraph.startswith("    ") else "    "
        return "\n".join(deeper + line for line in paragraph.splitlines())
    parts = re.split(r"(`[^`]*`)", paragraph)
    parts[::2] = [re.sub(r"([\[\]*<])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)
