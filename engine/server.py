"""The web page of search.py: its server (search.py serve), and the page as one file (search.py query --html).

tornado is imported when the server starts.
"""

import asyncio
import base64
import json
import os
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

from torch import Tensor

from engine.files import DataError, printable, write_atomic, writing
from engine.library import Hit, Library, stamp

LOCAL = r"(localhost|127\.0\.0\.1|\[::1\])"


@runtime_checkable
class Searcher(Protocol):
    """The part of search.Searcher that the page uses. It is documented there."""

    library: Library
    name: str

    def search(self, query: str, k: int) -> list[Hit]: ...
    def notes(self, query: str) -> list[str]: ...
    def rank(self, captions: Sequence[str], clip: Tensor) -> list[dict]: ...


def page(content: dict) -> str:
    """page.html with its content, as JSON. No text in it can end the script element."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return html.replace("/*CONTENT*/ null", json.dumps(content).replace("<", "\\u003c"))


def _shown(hit: Hit, video: str, strip: str) -> dict:
    """What page.html shows of a hit. video, strip: URLs."""
    return {**asdict(hit), "file": printable(hit.file), "video": video, "strip": strip}


def write_page(path: Path, searcher: Searcher, query: str, hits: Sequence[Hit]) -> None:
    """Writes the answer to a query as one HTML file: thumbnails inside, videos as links relative to the file.

    Raises DataError if it cannot be written."""
    library, folder, shown = searcher.library, path.resolve().parent, []
    strips = library.thumbnails([hit.id for hit in hits])
    for hit in hits:
        video = urllib.parse.quote(os.fsencode(os.path.relpath(library.path(hit.file), folder)))
        jpeg = base64.b64encode(strips.get(hit.id, b"")).decode()
        shown.append(_shown(hit, video, f"data:image/jpeg;base64,{jpeg}"))
    content = {"query": query, "hits": shown, "notes": searcher.notes(query), "model": searcher.name}
    with writing(path, DataError, "name another file with --html."):
        write_atomic(path, page(content).encode(errors="replace"))


def application(searcher: Searcher, captions: Sequence[str], hosts: str = LOCAL):
    """The page as a tornado application. It sends files of the library only, by clip id, and writes nothing.

    captions: ranked for a clip on request. hosts: a pattern of the host names that are answered. With the
    default, no other web site can reach the page through a visitor's browser."""
    web = _import_tornado().web
    worker = ThreadPoolExecutor(1)  # one query at a time; the server goes on sending videos meanwhile

    def run(function, *arguments):
        return asyncio.get_running_loop().run_in_executor(worker, function, *arguments)

    class Page(web.RequestHandler):
        def set_default_headers(self):
            policy = "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'"
            self.set_header("Content-Security-Policy", policy)
            self.set_header("X-Content-Type-Options", "nosniff")

        def get(self):
            self.finish(page({"serve": True, "model": searcher.name, "examples": list(captions[:200:40])}))

    class Search(Page):
        async def get(self):
            query, k = self.get_query_argument("q", ""), self.get_query_argument("k", "10")
            try:
                hits = await run(searcher.search, query, min(max(int(k), 1), 100) if k.isdecimal() else 10)
            except DataError as error:
                self.set_status(400)
                return self.finish({"error": str(error)})
            shown = [_shown(hit, f"clip/{hit.id}", f"thumbnails/{hit.id}") for hit in hits]
            self.finish({"hits": shown, "notes": searcher.notes(query)})

    class Captions(Page):
        async def get(self, id):
            clip = await run(searcher.library.clip, id)
            if clip is None:
                raise web.HTTPError(404)
            self.finish({"captions": (await run(searcher.rank, captions, clip[1]))[:10]})

    class Thumbnails(Page):
        async def get(self, id):
            strips = await run(searcher.library.thumbnails, [id])
            if id not in strips:
                raise web.HTTPError(404)
            self.set_header("Content-Type", "image/jpeg")
            self.finish(strips[id])

    class Video(web.StaticFileHandler):  # can send a part of a file (Range)
        @classmethod
        def get_absolute_path(cls, root, path):
            return path  # the id of a clip

        def validate_absolute_path(self, root, absolute_path):
            if searcher.library.clip(absolute_path) is None:
                raise web.HTTPError(404)
            path = searcher.library.path(searcher.library.names([absolute_path])[0])
            if not path.is_file():
                raise web.HTTPError(404)
            return str(path)

        @classmethod
        def get_content_version(cls, abspath):
            return stamp(Path(abspath), "")  # the default is a hash of all bytes

    id = "([0-9a-f]{24}-[0-9]+)"
    app = web.Application()
    pages = [(r"/", Page), (r"/search", Search), (rf"/captions/{id}", Captions)]
    files = [(rf"/thumbnails/{id}", Thumbnails), (rf"/clip/{id}", Video, {"path": "/"})]
    app.add_handlers(hosts, [*pages, *files])
    return app


def serve(searcher: Searcher, captions: Sequence[str], host: str, port: int) -> None:
    """Serves the page until Ctrl-C. port 0: any free port. Raises DataError if the address cannot be used."""
    tornado = _import_tornado()
    hosts = LOCAL if host in ("127.0.0.1", "localhost", "::1") else ".*"
    app = application(searcher, captions, hosts)
    try:
        sockets = tornado.netutil.bind_sockets(port, host)
    except OSError as error:
        raise DataError(f"{host}:{port} cannot be used ({error.strerror}): choose another --port.") from None

    async def forever():
        tornado.httpserver.HTTPServer(app).add_sockets(sockets)
        where = f"http://{host}:{sockets[0].getsockname()[1]}"
        print(f"serving {searcher.library.where} on {where} (Ctrl-C ends it)", flush=True)
        await asyncio.Event().wait()

    asyncio.run(forever())


def _import_tornado() -> ModuleType:
    try:
        import tornado.httpserver
        import tornado.netutil
        import tornado.web
    except ImportError:
        raise DataError("tornado is not installed: pip install -r requirements-search.txt.") from None
    return tornado
