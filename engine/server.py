"""The web page of search.py: its server (search.py serve), and the page as one file (search.py query --html).

The page asks the server by a JSON API (docs/search.md). tornado is imported when the server starts.
"""

import asyncio
import base64
import hashlib
import ipaddress
import json
import mimetypes
import os
import re
import secrets
import socket
import tempfile
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

from torch import Tensor

from engine.cutting import cut, suffix_of
from engine.files import DataError, ModelError, printable, stem, write_atomic, writing
from engine.library import Library, span, stamp
from engine.queries import Hit, Query, build_query

LOCAL = r"(localhost|127\.0\.0\.1|\[::1\])"
MOST = 100  # hits in one answer
PICTURE = 20 * 2**20  # bytes of a picture, at most
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@runtime_checkable
class Searcher(Protocol):
    """The part of search.Searcher that the page uses. It is documented there."""

    library: Library
    name: str

    def search(self, query: str | Query, k: int) -> list[Hit]: ...
    def notes(self, query: str | Query, hits: Sequence[Hit] = ()) -> list[str]: ...
    def picture_of(self, content: bytes) -> Tensor: ...
    def rank(self, captions: Sequence[str], clip: Tensor) -> list[dict]: ...


def page(content: dict) -> str:
    """page.html with its content, as JSON. No text in it can end the script element."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return html.replace("/*CONTENT*/ null", json.dumps(content).replace("<", "\\u003c"))


def _shown(hit: Hit, video: str, strip: str) -> dict:
    """What page.html shows of a hit. video, strip: URLs."""
    copies = [{**copy, "file": printable(copy["file"])} for copy in hit.copies]
    return {**asdict(hit), "file": printable(hit.file), "copies": copies, "video": video, "strip": strip}


def write_page(
    path: Path, searcher: Searcher, query: str, hits: Sequence[Hit], notes: Sequence[str] = ()
) -> None:
    """Writes the answer to a query as one HTML file: thumbnails inside, videos as links relative to the file.

    query: the title. notes: what is to be said of the query. Raises DataError if it cannot be written."""
    library, folder, shown = searcher.library, path.resolve().parent, []
    strips = library.thumbnails([hit.id for hit in hits])
    for hit in hits:
        video = urllib.parse.quote(os.fsencode(os.path.relpath(library.path(hit.file), folder)))
        jpeg = base64.b64encode(strips.get(hit.id, b"")).decode()
        shown.append(_shown(hit, video, f"data:image/jpeg;base64,{jpeg}"))
    content = {"query": query, "hits": shown, "notes": [*notes], "model": searcher.name}
    with writing(path, DataError, "name another file with --html."):
        write_atomic(path, page(content).encode(errors="replace"))


def host_names(host: str) -> str:
    """A pattern of the host names that the page answers to when it listens on `host`.

    Another web site can point its own name to this machine (DNS rebinding), so no foreign name is answered:
    on a loopback address only the names of this machine, else also IP addresses, `host` and its own name."""
    if _is_loopback(host):
        return rf"({LOCAL}|{re.escape(host)})"
    own = socket.gethostname()
    names = "|".join(re.escape(name.lower()) for name in (host, own, f"{own}.local") if name)
    return rf"({LOCAL}|[\d.]+|\[[\da-f:.]+\]|{names})"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def servable(library: Library, row: dict, links: bool = False) -> Path | None:
    """The path of an indexed file, if it is still the file that was indexed; else None.

    row: its row in the library. The file must have the size and time that are stored there, and lie in the
    library's folder: a link that leads out of it is followed only if `links`."""
    try:
        path = Path(os.path.realpath(library.path(row["file"])))
        inside = links or path.is_relative_to(library.about["folder"])
        same = inside and path.is_file() and row["stamp"].startswith(stamp(path, ""))
    except (OSError, DataError):
        return None
    return path if same else None


def application(searcher: Searcher, captions: Sequence[str], hosts: str = LOCAL, links: bool = False):
    """The page as a tornado application. It sends files of the library only, and keeps nothing that it gets.

    A clip is asked for by an id that only the page knows, once a query has found it: it depends on a secret
    of this process. captions: ranked for a clip on request. hosts: a pattern of the host names that are
    answered. With the default, no other web site can reach the page through a visitor's browser.
    links: also send files that links lead to outside the library's folder."""
    web = _import_tornado().web
    worker = ThreadPoolExecutor(1)  # one query at a time; the server goes on sending videos meanwhile
    cutter = ThreadPoolExecutor(1)
    secret, shown = secrets.token_bytes(32), {}  # shown: the ids of clips in the library, by their public ids

    def public(id: str) -> str:
        key = hashlib.blake2b(id.encode(), key=secret, digest_size=16).hexdigest()
        shown[key] = id
        return key

    def run(function, *arguments):
        return asyncio.get_running_loop().run_in_executor(worker, function, *arguments)

    class Answer(web.RequestHandler):
        def set_default_headers(self):
            for name, value in HEADERS.items():
                self.set_header(name, value)

        def prepare(self):
            asked = self.request.headers
            from_here = asked.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
            link = self.request.method == "GET" and asked.get("Sec-Fetch-Dest") == "document"
            if not from_here and not link:  # a link to the page is allowed
                raise web.HTTPError(403, reason="Other web sites cannot use this page")

        def write_error(self, status_code, **more):
            self.finish({"error": f"{self._reason}."})

        def known(self, key: str) -> str:
            if key not in shown:
                raise web.HTTPError(404, reason="This clip is not known here, search again")
            return shown[key]

    def answered(hit: Hit) -> dict:
        key, whole = public(hit.id), not hit.start and hit.end is None
        shown_hit = _shown(hit, f"clip/{key}", f"thumbnails/{key}")
        return {**shown_hit, "id": key, "cut": f"clip/{key}" if whole else f"cut/{key}"}

    class Missing(Answer):
        def prepare(self):
            raise web.HTTPError(404)

    class Page(Answer):
        def get(self):
            self.finish(page({"serve": True, "model": searcher.name, "examples": list(captions[:200:40])}))

    class Search(Answer):
        async def get(self):
            await self.answer(None)

        async def post(self):
            if not self.request.headers.get("Content-Type", "").startswith("image/"):  # no form can send this
                raise web.HTTPError(415, reason="Send the bytes of a picture, as image/jpeg or image/png")
            await self.answer(self.request.body)

        async def answer(self, picture: bytes | None):
            k = self.get_query_argument("k", "10")
            one = {name: self.get_query_argument(name, "") for name in ("q", "in", "newer", "older", "like")}
            more = {name: self.get_query_arguments(name) for name in ("and", "not")}
            own = self.known(one["like"]) if one["like"] else None
            every = self.get_query_argument("all", "") not in ("", "0")

            def find() -> tuple[list[Hit], list[str]]:
                count = int(k) if re.fullmatch(r"\d{1,4}", k, re.ASCII) else 0
                if not 1 <= count <= MOST:
                    raise DataError(f"k must be a whole number from 1 to {MOST}.")
                also, pictures = [weighted(text) for text in more["and"]], []
                if picture is not None:
                    pictures.append(searcher.picture_of(picture))
                if own is not None:
                    if (clip := searcher.library.clip(own)) is None:
                        raise DataError("the clip is no longer in the library: search again.")
                    pictures.append(clip[1][0])
                where = (one["in"], one["newer"] or None, one["older"] or None)
                without = frozenset([own] if own else [])
                query = build_query(one["q"], also, more["not"], pictures, *where, without, every)
                return (found := searcher.search(query, count)), searcher.notes(query, found)

            try:
                hits, notes = await run(find)
            except (DataError, ModelError) as error:
                self.set_status(400)
                return self.finish({"error": printable(str(error))})
            self.finish({"hits": [answered(hit) for hit in hits], "notes": notes})

    class Captions(Answer):
        async def get(self, key):
            clip = await run(searcher.library.clip, self.known(key))
            if clip is None:
                raise web.HTTPError(404)
            try:
                self.finish({"captions": (await run(searcher.rank, captions, clip[1]))[:10]})
            except (DataError, ModelError) as error:
                self.set_status(400)
                self.finish({"error": str(error)})

    class Thumbnails(Answer):
        async def get(self, key):
            strips = await run(searcher.library.thumbnails, [id := self.known(key)])
            if id not in strips:
                raise web.HTTPError(404)
            self.set_header("Content-Type", "image/jpeg")
            self.finish(strips[id])

    class Cut(Answer):
        async def get(self, key):
            clip = await run(searcher.library.clip, id := self.known(key))
            row = searcher.library.file_rows([id])[0]
            if clip is None or (path := servable(searcher.library, row, links)) is None:
                raise web.HTTPError(404, reason="The file has changed since it was indexed, or is not there")
            start, end = clip[0]["start"], clip[0]["end"]
            with tempfile.TemporaryDirectory() as folder:
                part = Path(folder, "clip" + suffix_of(path, start, end))
                try:
                    await asyncio.get_running_loop().run_in_executor(cutter, cut, path, part, start, end)
                except DataError:
                    raise web.HTTPError(500, reason="ffmpeg cannot cut this file") from None
                name = printable(f"{stem(Path(row['file']).name)} {span(start, end)}{part.suffix}")
                self.set_header("Content-Type", "application/octet-stream")
                self.set_header(
                    "Content-Disposition", f"attachment; filename*=UTF-8''{urllib.parse.quote(name, safe='')}"
                )
                with part.open("rb") as file:
                    while piece := file.read(2**20):
                        self.write(piece)
                        await self.flush()

    class Video(Answer, web.StaticFileHandler):  # can send a part of a file (Range)
        @classmethod
        def get_absolute_path(cls, root, path):
            return path  # the public id of a clip

        def validate_absolute_path(self, root, absolute_path):
            row = searcher.library.file_rows([self.known(absolute_path)])[0]
            if (path := servable(searcher.library, row, links)) is None:
                raise web.HTTPError(404, reason="The file has changed since it was indexed, or is not there")
            return str(path)

        def get_content_type(self):  # never a page or a script, whatever the file holds
            found = mimetypes.guess_type(self.absolute_path)[0] or ""
            return found if found.startswith("video/") or found == "image/gif" else "video/mp4"

        @classmethod
        def get_content_version(cls, abspath):
            return stamp(Path(abspath), "")  # the default is a hash of all bytes

    key = "([0-9a-f]{32})"
    app = web.Application(default_handler_class=Missing)
    pages = [(r"/", Page), (r"/search", Search), (rf"/captions/{key}", Captions)]
    files = [(rf"/thumbnails/{key}", Thumbnails), (rf"/clip/{key}", Video, {"path": "/"})]
    files += [(rf"/cut/{key}", Cut)]
    app.add_handlers(hosts, [*pages, *files])
    return app


def weighted(text: str) -> tuple[float, str]:
    """ "0.5 on a beach" as (0.5, "on a beach"). Raises DataError."""
    weight, _, words = text.strip().partition(" ")
    try:
        return float(weight), words.strip()
    except ValueError:
        raise DataError(f"and={text} begins with no weight: write it as and=0.5 on a beach.") from None


def address(host: str, port: int) -> str:
    """The address of the page to print, as a browser takes it."""
    name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    where = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    return where if name == host else f"{where} and all other addresses of this machine"


def serve(searcher: Searcher, captions: Sequence[str], host: str, port: int, links: bool = False) -> None:
    """Serves the page until Ctrl-C. port 0: any free port. Raises DataError if the address cannot be used."""
    tornado, host = _import_tornado(), host.strip("[]")
    app = application(searcher, captions, host_names(host), links)
    try:
        sockets = tornado.netutil.bind_sockets(port, host)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "choose another --host or --port"
        raise DataError(f"{host}:{port} cannot be used ({reason}): {advice}.") from None

    async def forever():
        tornado.httpserver.HTTPServer(app, max_body_size=PICTURE).add_sockets(sockets)
        where = address(host, sockets[0].getsockname()[1])
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
