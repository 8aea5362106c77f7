"""The page of search.py: it answers queries, plays clips, and sends nothing else."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
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
from engine.library import Library

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
    shutil.copy(rendered[4], videos / "unlisted.mp4")
    captions.write_text("a ring\na <u>square</u> falls\n")
    code = f"""if True:
        import search, pathlib
        folder, checkpoint = pathlib.Path({str(videos)!r}), pathlib.Path({str(checkpoint)!r})
        search.index(search.IndexConfig(folder, {library!r}, checkpoint))
        search.Library({library!r}).drop(["unlisted.mp4"])
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


def test_the_server_sends_nothing_that_is_not_a_clip_of_the_library(server):
    address, place = server
    port, unlisted = int(address.rsplit(":", 1)[1]), Library.key("unlisted.mp4")
    known = json.loads(get(f"{address}/search?q=a")[1])["hits"][0]["id"]
    secret = str(place / "videos" / "secret.txt")
    paths = ["secret.txt", "../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", secret, "unlisted.mp4"]
    paths += ["a%20b.mp4", f"{unlisted}-0", f"{known}/../../secret.txt", f"{known}%00", "0" * 24 + "-0"]
    requests = [
        prefix + path
        for path in ["", "page.html", *paths]
        for prefix in ("/clip/", "/thumbnails/", "/clip//", "/")
    ]
    for request in requests[:3] + requests[4:]:  # all but "/", the page itself
        with socket.create_connection(("127.0.0.1", port)) as connection:  # a client would tidy the path
            connection.sendall(f"GET {request} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            answer = b"".join(iter(functools.partial(connection.recv, 65536), b""))
        assert re.match(rb"HTTP/1\.[01] (404|400|403)", answer), (request, answer)
        assert b"secret" not in answer.split(b"\r\n\r\n", 1)[1], (request, answer)


def test_the_server_answers_only_to_its_own_name(server):
    assert get(server[0] + "/")[0] == 200
    assert (
        get(server[0] + "/", Host="evil.example")[0] == 404
    )  # another site whose name points to this address


def test_a_port_in_use_gives_one_sentence(server, indexed):
    port = int(server[0].rsplit(":", 1)[1])
    message = sentence(page_server.serve, searching(indexed[0]), ["a ring"], "127.0.0.1", port)
    assert f"127.0.0.1:{port} cannot be used" in message and "--port" in message


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
        yield running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


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
