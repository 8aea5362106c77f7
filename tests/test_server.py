"""The page of search.py: it answers queries, plays clips, and sends nothing else."""

import asyncio
import contextlib
import functools
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("pymilvus", reason="pip install -r requirements-search.txt")
pytest.importorskip("milvus_lite", reason="pip install -r requirements-search.txt")
pytest.importorskip("tornado", reason="pip install -r requirements-search.txt")

import test_search
from test_library import sentence
from test_search import CLIPS, FRAMES, NAMES, searching

import search
from engine import server as page_server
from engine.frames import decode_frames
from engine.indexing import IndexConfig
from engine.library import Library, stamp
from engine.queries import build_query

checkpoint, rendered, indexed = test_search.checkpoint, test_search.rendered, test_search.indexed  # fixtures


# ---- the page as a file


def test_the_written_page_holds_all_but_the_videos_and_no_name_is_code(indexed, tmp_path):
    searcher, path = searching(indexed[0]), tmp_path / "deep" / "out.html"
    page_server.write_page(path, searcher, "</script><b>", searcher.search("a ring", CLIPS))
    text = path.read_text()
    assert text.count("</script>") == 1 and "http://" not in text and "https://" not in text
    content = json.loads(re.search(r"^const content = (.*);$", text, re.M)[1])
    assert content["query"] == "</script><b>" and {hit["file"] for hit in content["hits"]} == {*NAMES}
    for hit in content["hits"]:
        assert hit["strip"].startswith("data:image/jpeg;base64,/9j/")
        assert (tmp_path / "deep" / urllib.request.unquote(hit["video"])).samefile(indexed[1] / hit["file"])


def test_a_page_that_cannot_be_written_gives_one_sentence(indexed, tmp_path):
    (tmp_path / "file").write_text("")
    message = sentence(page_server.write_page, tmp_path / "file" / "out.html", searching(indexed[0]), "a", [])
    assert "name another file with --html" in message


# ---- the server


@pytest.fixture(scope="module")
def server(tmp_path_factory, rendered, checkpoint):
    """The address of `search.py serve` as its own process, with its own library."""
    place = tmp_path_factory.mktemp("served")
    videos, library, captions = place / "videos", str(place / "library.db"), place / "captions.txt"
    videos.mkdir()
    for name, path in zip(("a b.mp4", "<i>.mp4", "no.avi"), rendered):
        shutil.copy(path, videos / name)
    (videos / "secret.txt").write_text("secret")
    (place / "secret.txt").write_text("secret")
    shutil.copy(rendered[4], videos / "unlisted.mp4")
    captions.write_text("a ring\na <u>square</u> falls\n")
    code = f"""if True:
        import pathlib, search
        from engine.library import Library
        folder, checkpoint = pathlib.Path({str(videos)!r}), pathlib.Path({str(checkpoint)!r})
        search.index(search.IndexConfig(folder, {library!r}, checkpoint))
        Library({library!r}).drop(["unlisted.mp4"])
        search.main(["serve", "--library", {library!r}, "--port", "0", "--captions", {str(captions)!r}])"""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    line = next(line for line in process.stdout if line.startswith("serving"))
    yield re.search(r"http://127\.0\.0\.1:\d+", line)[0], place
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def get(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, dict]:
    with contextlib.ExitStack() as stack:
        try:
            request = urllib.request.Request(url, data, headers)
            answer = stack.enter_context(urllib.request.urlopen(request, timeout=20))
        except urllib.error.HTTPError as error:
            answer = stack.enter_context(error)
        return answer.status, answer.read(), dict(answer.headers)


def test_the_server_answers_queries_and_sends_parts_of_videos(server):
    address, place = server
    hits = json.loads(get(f"{address}/search?q=a+ring&k=2")[1])["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2]
    video = (place / "videos" / hits[0]["file"]).read_bytes()
    status, body, headers = get(f"{address}/{hits[0]['video']}")
    assert (status, body, headers["Accept-Ranges"]) == (200, video, "bytes")
    status, body, headers = get(f"{address}/{hits[0]['video']}", Range="bytes=100-199")
    assert (status, body) == (206, video[100:200])
    assert headers["Content-Range"] == f"bytes 100-199/{len(video)}"
    assert get(f"{address}/{hits[0]['strip']}")[1][:2] == b"\xff\xd8"
    captions = json.loads(get(f"{address}/captions/{hits[0]['id']}")[1])["captions"]
    assert {one["caption"] for one in captions} == {"a ring", "a <u>square</u> falls"}
    assert captions[0]["score"] >= captions[1]["score"]
    status, body, _ = get(f"{address}/search?q=+")
    assert status == 400 and "query is empty" in json.loads(body)["error"]


def hits_of(address: str) -> dict[str, dict]:
    """All clips that the server knows, by file."""
    return {hit["file"]: hit for hit in json.loads(get(f"{address}/search?q=a")[1])["hits"]}


def test_the_server_sends_nothing_that_is_not_a_clip_of_the_library(server):
    address, place = server
    port, computed = (
        int(address.rsplit(":", 1)[1]),
        [f"{Library.key(name)}-0" for name in ("a b.mp4", "unlisted.mp4")],
    )
    known = hits_of(address)["a b.mp4"]["id"]
    assert not any(
        set(re.findall("[0-9a-f]{8}", id)) & set(re.findall("[0-9a-f]{8}", known)) for id in computed
    )
    secret = str(place / "videos" / "secret.txt")
    paths = ["secret.txt", "../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", secret, "unlisted.mp4"]
    paths += [
        "a%20b.mp4",
        *computed,
        f"{known}/../../secret.txt",
        f"{known}%00",
        "0" * 32,
        known.upper() + "%0a",
    ]
    requests = [
        prefix + path
        for path in ["", "page.html", *paths]
        for prefix in ("/clip/", "/thumbnails/", "/captions/", "/cut/", "/clip//", "/")
    ]
    for request in requests[:5] + requests[6:]:  # all but "/", the page itself
        with socket.create_connection(("127.0.0.1", port)) as connection:  # a client would tidy the path
            connection.sendall(f"GET {request} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            answer = b"".join(iter(functools.partial(connection.recv, 65536), b""))
        assert re.match(rb"HTTP/1\.[01] (404|400|403)", answer), (request, answer)
        assert b"secret" not in answer.split(b"\r\n\r\n", 1)[1], (request, answer)


@pytest.mark.parametrize(
    "swap", ["another file", "a link out of the folder", "a link with the same stamp", "nothing"]
)
def test_the_server_sends_a_file_only_as_it_was_indexed(server, swap):
    address, place = server
    path, kept, url = (
        place / "videos" / "no.avi",
        place / "kept",
        f"{address}/{hits_of(address)['no.avi']['video']}",
    )
    assert get(url)[0] == 200
    path.rename(kept)
    try:
        if swap == "another file":
            shutil.copy(place / "videos" / "a b.mp4", path)
        elif swap == "a link out of the folder":
            path.symlink_to(place / "secret.txt")
        elif swap == "a link with the same stamp":
            path.symlink_to(kept)
        status, body, headers = get(url)
        assert (status, headers["X-Content-Type-Options"]) == (404, "nosniff")
        assert "has changed since it was indexed" in json.loads(body)["error"]
    finally:
        path.unlink(missing_ok=True)
        kept.rename(path)
    assert get(url)[0] == 200


def test_a_file_is_served_from_its_folder_and_through_links_only_when_asked(tmp_path):
    videos, other = tmp_path / "videos", tmp_path / "videos too"
    for folder in (videos, other):
        folder.mkdir()
    (videos / "a.mp4").write_bytes(b"a")
    (other / "b.mp4").write_bytes(b"b")
    (videos / "in.mp4").symlink_to("a.mp4")
    (videos / "out.mp4").symlink_to(other / "b.mp4")
    (videos / "disk").symlink_to(other)
    library = Library.__new__(Library)
    library.about = {"folder": str(videos)}
    for file, real, inside in [("a.mp4", videos / "a.mp4", True), ("in.mp4", videos / "a.mp4", True)] + [
        (file, other / "b.mp4", False) for file in ("out.mp4", "disk/b.mp4")
    ]:
        row = {"file": file, "stamp": stamp(real, "whole")}
        assert page_server.servable(library, row) == (real if inside else None)
        assert page_server.servable(library, row, links=True) == real
        for old in ("", "1 2 whole", stamp(real, "whole")[1:]):
            assert page_server.servable(library, {**row, "stamp": old}, links=True) is None
    for file in ("../videos too/b.mp4", str(other / "b.mp4"), "gone.mp4", "disk", "a.mp4/x", "x" * 5000):
        assert (
            page_server.servable(library, {"file": file, "stamp": stamp(other / "b.mp4", "")}, links=True)
            is None
        )


def test_the_server_answers_only_to_its_own_name(server):
    assert get(server[0] + "/")[0] == 200
    for name in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "10.0.0.7",
        "",
    ):  # DNS rebinding
        assert get(server[0] + "/", Host=name)[0] == 404, name


def test_no_answer_is_guessed_to_be_of_another_type_or_used_by_another_site(server):
    address, hit = server[0], hits_of(server[0])["<i>.mp4"]
    paths = {"": 200, "search?q=a": 200, "search?q=+": 400, "none": 404, "clip/0": 404, "search?q=%ff": 400}
    paths |= {hit["video"]: 200, hit["strip"]: 200, f"captions/{hit['id']}": 200, f"clip/{'0' * 32}": 404}
    asked = [(path, {}, status) for path, status in paths.items()]
    asked += [(hit["video"], {"Range": "bytes=0-9"}, 206), (hit["video"], {"Range": "bytes=99999999-"}, 416)]
    asked += [(path, {"Host": "evil.example"}, 404) for path in ("", hit["video"])]
    for site in ("cross-site", "same-site"):
        asked += [
            (path, {"Sec-Fetch-Site": site, "Sec-Fetch-Dest": "video"}, 403) for path in ("", hit["video"])
        ]
        asked += [("", {"Sec-Fetch-Site": site, "Sec-Fetch-Dest": "document"}, 200)]  # a link to the page
    asked += [(hit["video"], {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "video"}, 200)]
    for path, headers, expected in asked:
        status, _, answered = get(f"{address}/{path}", **headers)
        assert status == expected, (path, headers)
        assert page_server.HEADERS.items() <= answered.items(), (path, headers)
    assert get(f"{address}/{hit['video']}")[2]["Content-Type"] == "video/mp4"


@pytest.mark.parametrize("k", ["9" * 5000, "0", "-1", "1.5", "ten", "", "²", "٣", "101", "1e2", "0x10"])
def test_a_number_of_hits_that_is_none_gives_one_sentence(server, k):
    status, body, _ = get(f"{server[0]}/search?q=a&k={urllib.request.quote(k)}")
    assert status == 400 and json.loads(body) == {"error": "k must be a whole number from 1 to 100."}


def test_other_odd_queries_are_answered(server):
    address, long = server[0], "%20".join(["x" * 9] * 300)
    assert "at most 2000" in json.loads(get(f"{address}/search?q={long}")[1])["error"]
    for query in ("q=a&q=b", "q=%F0%9F%99%82", "q=a&k=2&k=3", "q=" + "%3Cb%3E" * 50, "q=a&x[]=1&&="):
        status, body, _ = get(f"{address}/search?{query}")
        assert status == 200 and json.loads(body)["hits"], query
    assert get(f"{address}/search")[0] == 400


def test_other_hosts_open_the_page_to_addresses_and_not_to_foreign_names():
    def answers(host: str, name: str) -> bool:
        return bool(re.fullmatch(page_server.host_names(host), name))

    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert answers(host, "localhost") and answers(host, "[::1]") and not answers(host, "192.168.0.2")
    assert answers("127.0.0.2", "127.0.0.2")
    for host in ("0.0.0.0", "::", "", "192.168.0.2", "nas.lan"):
        own = (host, socket.gethostname().lower(), "192.168.0.2", "[fe80::1]", "localhost")
        assert all(answers(host, name) for name in own if name and name != "::")
        assert not any(
            answers(host, name) for name in ("evil.example", "", "192.168.0.2.evil.example", "nas.lan.evil")
        )


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000 and all other addresses of this machine"),
        ("::", "http://[::1]:8000 and all other addresses of this machine"),
    ],
)
def test_the_printed_address_is_one_that_a_browser_takes(host, shown):
    assert page_server.address(host, 8000) == shown


@pytest.mark.parametrize(("host", "port"), [("no.invalid", 0), ("a" * 70, 0), ("8.8.8.8", 0)])
def test_an_address_that_cannot_be_used_gives_one_sentence(host, port, indexed):
    message = sentence(page_server.serve, searching(indexed[0]), ["a ring"], host, port)
    assert f"{host}:{port} cannot be used" in message and "choose another --host or --port" in message


def test_the_features_of_the_captions_are_computed_once(indexed, monkeypatch):
    searcher, calls = searching(indexed[0]), []
    clips, real = next(frames for _, frames in searcher.library.batches()), searcher.model.encode_text
    monkeypatch.setattr(
        searcher.model, "encode_text", lambda tokens: calls.append(len(tokens)) or real(tokens)
    )
    answers = [searcher.rank(["a ring", "a star"], clip) for clip in clips.split(1)]
    assert calls == [2] and answers[0] != answers[1]
    assert answers[1] == searching(indexed[0]).rank(["a ring", "a star"], clips[1:2])
    assert {one["caption"] for one in searcher.rank(["a dog"], clips[:1])} == {"a dog"} and calls == [2, 1]


def test_a_port_in_use_gives_one_sentence(server, indexed):
    port = int(server[0].rsplit(":", 1)[1])
    message = sentence(page_server.serve, searching(indexed[0]), ["a ring"], "127.0.0.1", port)
    assert f"127.0.0.1:{port} cannot be used (Address already in use): choose another" in message


def test_without_tornado_one_sentence_says_what_to_install(indexed, monkeypatch):
    for name in ("tornado", "tornado.httpserver", "tornado.netutil", "tornado.web"):
        monkeypatch.setitem(sys.modules, name, None)
    message = sentence(page_server.serve, searching(indexed[0]), ["a ring"], "127.0.0.1", 0)
    assert "pip install -r requirements-search.txt" in message


# ---- the JSON API


def png(path, number: int = 2) -> bytes:
    """A frame of a video as a picture file."""
    file = io.BytesIO()
    Image.fromarray(decode_frames(path, FRAMES)[number]).save(file, "PNG")
    return file.getvalue()


def test_the_api_answers_as_the_command_does(server):
    address, place = server
    searcher, picture = searching(str(place / "library.db")), png(place / "videos" / "no.avi")
    id = hits_of(address)["a b.mp4"]["id"]
    (row,), frames = searcher.library.clips_of("a b.mp4")
    more = {"also": [(0.5, "at sea"), (-1.0, "a star")], "unlike": ["snow", "night"]}
    own = {"pictures": [frames[0]], "without": frozenset([row["id"]])}
    for query, data, expected in [
        ("q=a+ring&and=0.5+at+sea&and=-1+a+star&not=snow&not=night", None, build_query("a ring", **more)),
        (f"like={id}", None, build_query("", **own)),
        (f"like={id}&q=a+ring&older=2100-01-01", None, build_query("a ring", older="2100-01-01", **own)),
        ("", picture, build_query("", pictures=[searcher.picture_of(picture)])),
        ("not=snow", picture, build_query("", unlike=["snow"], pictures=[searcher.picture_of(picture)])),
        ("q=a&in=.&all=1", None, build_query("a", inside=".", all=True)),
    ]:
        status, body, _ = get(f"{address}/search?{query}", data, **{"Content-Type": "image/png"})
        hits, found = json.loads(body)["hits"], searcher.search(expected, 10)
        assert status == 200 and [(hit["file"], hit["best"]) for hit in hits] == [
            (h.file, h.best) for h in found
        ]
        for hit, one in zip(hits, found):
            assert (hit["score"], hit["time"]) == pytest.approx((one.score, one.time), abs=1e-5)
    assert get(f"{address}/{hits[0]['cut']}")[1] == (place / "videos" / hits[0]["file"]).read_bytes()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("q=a&and=b", "begins with no weight"),
        ("q=a&and=inf+b", "weight of 'b' is inf"),
        ("q=a&newer=now", "'now' is not a date"),
        ("q=a&in=none", "no file in 'none'"),
        ("q=a&in=/etc", "not in the folder of the library"),
        ("q=a&newer=2100-01-01", "no file of the library has such a date"),
        ("not=b", "nothing is looked for"),
    ],
)
def test_a_wrong_question_gives_one_sentence_that_tells_no_path(server, query, said):
    status, body, _ = get(f"{server[0]}/search?{query}")
    error = json.loads(body)["error"]
    assert status == 400 and said in error and str(server[1]) not in error
    assert get(f"{server[0]}/search?like={'0' * 32}")[0] == 404


def test_a_picture_comes_from_the_page_alone_and_is_one(server):
    address, picture = f"{server[0]}/search", png(server[1] / "videos" / "no.avi")
    image = {"Content-Type": "image/png"}
    assert get(address, b"no picture", **image)[0] == 400
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
    ):  # of any site's form
        assert get(address, picture, **{"Content-Type": kind})[0] in (400, 415)
    for site, to, status in [
        ("cross-site", "document", 403),
        ("cross-site", "empty", 403),
        ("same-origin", "empty", 200),
    ]:
        headers = {**image, "Sec-Fetch-Site": site, "Sec-Fetch-Dest": to}
        assert get(address, picture, **headers)[0] == status
    with pytest.raises((urllib.error.URLError, ConnectionError)):  # closed before it is read
        status, *_ = get(address, bytes(page_server.PICTURE + 1), **image)
        assert status in (400, 413)
        raise ConnectionError


def test_a_part_of_a_file_is_sent_as_a_file_of_its_own(tmp_path, rendered, checkpoint):
    (tmp_path / "videos").mkdir()
    path = shutil.copy(rendered[0], tmp_path / "videos" / 'ring "1".mp4')
    library = str(tmp_path / "library.db")
    assert search.index(IndexConfig(tmp_path / "videos", library, checkpoint, window=1.0)) == 0
    app = page_server.application(searching(library), ["a ring"])
    from tornado.httpserver import HTTPServer
    from tornado.netutil import bind_sockets

    (listening, *_) = sockets = bind_sockets(0, "127.0.0.1")
    loop = asyncio.new_event_loop()

    def serve():
        asyncio.set_event_loop(loop)
        HTTPServer(app).add_sockets(sockets)
        loop.run_forever()

    threading.Thread(target=serve, daemon=True).start()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    hits = json.loads(get(f"{address}/search?q=a&all=1")[1])["hits"]
    for hit in hits:
        status, body, headers = get(f"{address}/{hit['cut']}")
        assert status == 200 and headers["Content-Disposition"].startswith(
            "attachment; filename*=UTF-8''ring%20"
        )
        (tmp_path / "part.mp4").write_bytes(body)
        frames = decode_frames(tmp_path / "part.mp4", 24)
        for frame in decode_frames(path, 3, hit["start"], hit["end"]):
            assert any(np.array_equal(frame, other) for other in frames)
    path.write_bytes(b"changed")
    assert get(f"{address}/{hits[0]['cut']}")[0] == 404
    loop.call_soon_threadsafe(loop.stop)
