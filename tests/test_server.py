"""The page of search.py: it answers queries, plays clips, and sends nothing else."""

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from conftest import ROOT

pytest.importorskip("pymilvus", reason="pip install -r requirements-search.txt")
pytest.importorskip("milvus_lite", reason="pip install -r requirements-search.txt")
pytest.importorskip("tornado", reason="pip install -r requirements-search.txt")

import test_search
from test_library import sentence
from test_search import CLIPS, FRAMES, NAMES, searching

from engine import server as page_server
from engine.library import Library, stamp

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


def get(url: str, **headers: str) -> tuple[int, bytes, dict]:
    with contextlib.ExitStack() as stack:
        try:
            request = urllib.request.Request(url, headers=headers)
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
        for prefix in ("/clip/", "/thumbnails/", "/captions/", "/clip//", "/")
    ]
    for request in requests[:4] + requests[5:]:  # all but "/", the page itself
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


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if not chromium:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        flags = ["--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
        yield running.chromium.launch(executable_path=chromium, args=flags)


def test_in_a_browser_a_query_shows_clips_that_play_and_captions_that_fit(server, browser):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(server[0])
    page.fill("input", "a <b>ring</b>")
    page.press("input", "Enter")
    page.wait_for_selector(".hit >> nth=2")
    titles = page.locator(".hit .title span:first-of-type").all_inner_texts()
    assert page.locator(".hit").count() == 3 and titles.count("<i>.mp4") == 1
    assert page.locator(".bars span").count() == 3 * FRAMES
    page.wait_for_function("() => [...document.images].every(one => one.complete && one.naturalWidth > 0)")
    page.hover(".hit:first-child .screen")
    page.wait_for_function("() => document.querySelector('.hit:first-child video').currentTime > 0.1")
    page.click(".hit:first-child .fit button")
    page.wait_for_selector(".fit li")
    assert "a <u>square</u> falls" in page.locator(".hit:first-child .fit").inner_text()
    page.fill("input", " ")
    page.press("input", "Enter")
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('query is empty')")
    assert page.locator(".hit").count() == 0 and not errors


EVIL = """<script>
const target = TARGET, found = [];
const load = (tag, name, path) => new Promise(done => {
  const made = document.createElement(tag);
  made.onload = made.onloadeddata = made.onloadedmetadata = () => { found.push(`${tag} ${path}`); done(); };
  made.onerror = done;
  made[name] = target + "/" + path;
  if (tag == "link") made.rel = "stylesheet";
  document.body.append(made);
  setTimeout(done, 3000);
});
const read = (path, options) => fetch(target + "/" + path, options).then(
  () => found.push(`fetch ${path} ${JSON.stringify(options)}`), () => 0);
onload = async () => {
  const frame = document.createElement("iframe");
  frame.src = target + "/";
  document.body.append(frame);
  for (const path of PATHS) {
    await Promise.all([
      load("img", "src", path), load("video", "src", path), load("audio", "src", path),
      load("script", "src", path), load("link", "href", path), load("object", "data", path),
      read(path, {}), read(path, { mode: "no-cors" }), read(path, { credentials: "include" }),
      read(path, { method: "POST" })]);
  }
  const popup = open(target + "/?q=a");
  await new Promise(done => setTimeout(done, 1500));
  try { if (popup && popup.document.body.innerText) found.push("popup"); } catch {}
  try { if (frame.contentDocument && frame.contentDocument.body.innerText) found.push("frame"); } catch {}
  document.title = JSON.stringify(found);
};
</script><body></body>"""


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost"]
)  # the same host on another port is another origin
def test_in_a_browser_another_site_can_neither_read_nor_show_anything(server, browser, host):
    hit = hits_of(server[0])["a b.mp4"]  # even if it knew the ids
    paths = ["", "search?q=a", hit["video"], hit["strip"], f"captions/{hit['id']}"]
    text = EVIL.replace("TARGET", json.dumps(server[0])).replace("PATHS", json.dumps(paths))

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_): ...

    evil = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=evil.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(f"http://{host}:{evil.server_port}/")
    page.wait_for_function("() => document.title.startsWith('[')", timeout=60_000)
    assert json.loads(page.title()) == []
    evil.shutdown()


def test_in_a_browser_a_foreign_name_of_this_machine_is_not_answered(server, browser):
    page, port = browser.new_page(), server[0].rsplit(":", 1)[1]
    answer = page.goto(f"http://evil.example:{port}/")  # the browser takes this name for 127.0.0.1
    assert answer.status == 404 and "attention" not in page.content()


def test_in_a_browser_an_unplayable_file_is_reported_and_the_written_page_works_from_disk(
    indexed, browser, tmp_path
):
    searcher, path = searching(indexed[0]), tmp_path / "out.html"
    hits = searcher.search("a ring", 2)
    shutil.copytree(indexed[1], tmp_path / "videos")
    (tmp_path / "videos" / hits[1].file).write_text("no longer a video")
    page_server.write_page(path, searcher, "a ring", hits)
    text = path.read_text()
    for hit in hits:  # links lead to the copy
        old = urllib.request.quote(os.path.relpath(indexed[1] / hit.file, tmp_path))
        text = text.replace(old, urllib.request.quote(f"videos/{hit.file}"))
    path.write_text(text)
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("text=This browser cannot play the file")
    page.wait_for_function("() => document.querySelector('.hit:first-child video').readyState >= 2")
    assert page.locator("form").is_hidden() and page.locator("h1").inner_text() == "a ring"
    assert page.locator(".strip img").count() == 2
