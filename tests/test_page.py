"""The page of search.py in a browser: what it shows and plays, and that no other site can use it.

Needs playwright and a Chromium; without them the tests are skipped.
"""

import base64
import http.server
import json
import os
import shutil
import threading
import urllib.request

import pytest

pytest.importorskip("pymilvus", reason="pip install -r requirements-search.txt")
pytest.importorskip("milvus_lite", reason="pip install -r requirements-search.txt")
pytest.importorskip("tornado", reason="pip install -r requirements-search.txt")

import test_server
from test_search import FRAMES, searching
from test_server import get, hits_of, png

from engine import server as page_server

checkpoint, rendered, indexed, server = (  # fixtures
    test_server.checkpoint,
    test_server.rendered,
    test_server.indexed,
    test_server.server,
)


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


def test_in_a_browser_a_query_shows_clips_that_play_and_captions_that_fit(browser, server):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(server[0])
    page.fill("[name=q]", "a <b>ring</b>")
    page.press("[name=q]", "Enter")
    page.wait_for_selector(".hit >> nth=2")
    titles = page.locator(".hit .title .file").all_inner_texts()
    assert page.locator(".hit").count() == 3 and titles.count("<i>.mp4") == 1
    assert page.locator(".bars span").count() == 3 * FRAMES
    images = "[...document.querySelectorAll('.strip img')]"
    page.wait_for_function(f"() => {images}.every(one => one.complete && one.naturalWidth > 0)")
    page.hover(".hit:first-child .screen")
    page.wait_for_function("() => !document.querySelector('.hit:first-child video').paused")
    page.click(".hit:first-child >> text=Which captions fit")
    page.wait_for_selector(".more li")
    assert "a <u>square</u> falls" in page.locator(".hit:first-child .more").inner_text()
    page.fill("[name=q]", " ")
    page.press("[name=q]", "Enter")
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('query is empty')")
    assert page.locator(".hit").count() == 0 and not errors


def looks_of(page) -> list[str]:
    """The files that the page shows."""
    return page.locator(".hit .title .file").all_inner_texts()


def test_in_a_browser_the_keyboard_plays_the_best_frame_first(browser, server):
    page = browser.new_page()
    page.goto(f"{server[0]}/?q=a+ring")
    page.wait_for_selector(".hit >> nth=2")
    hits = json.loads(get(f"{server[0]}/search?q=a+ring")[1])["hits"]
    page.evaluate("""() => { window.times = []; for (const video of document.querySelectorAll("video"))
        video.addEventListener("play", () => times.push(video.currentTime)); }""")
    page.locator("#theme").focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "q"
    number = next(n for n, hit in enumerate(hits) if hit["file"] != "no.avi")  # Chromium plays no AVI
    for _ in range(number + 1):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function("() => times.length == 1")
    assert page.evaluate("times[0]") == pytest.approx(hits[number]["time"], abs=0.3)  # frames: 0.75 s apart
    assert "best at" in page.locator(".hit .at >> nth=-1").inner_text()
    page.keyboard.press("Enter")
    page.wait_for_function(f"() => document.querySelectorAll('video')[{number}].paused")
    for _ in range(number + 1):
        page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.name") == "q"


def test_in_a_browser_a_picture_is_pasted_dropped_or_picked_and_a_hit_finds_more_like_it(browser, server):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(server[0])
    picture = png(server[1] / "videos" / "<i>.mp4")
    expected = json.loads(get(f"{server[0]}/search", picture, **{"Content-Type": "image/png"})[1])["hits"]
    carried = page.evaluate_handle(
        """text => {
        const made = new DataTransfer(), bytes = Uint8Array.from(atob(text), one => one.charCodeAt(0));
        made.items.add(new File([bytes], "p.png", { type: "image/png" })); return made; }""",
        base64.b64encode(picture).decode(),
    )
    paste = "data => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data }))"
    file = {"name": "p.png", "mimeType": "image/png", "buffer": picture}
    for bring in (
        lambda: page.dispatch_event("body", "drop", {"dataTransfer": carried}),
        lambda: page.evaluate(paste, carried),
        lambda: page.set_input_files("[type=file]", file),
    ):
        bring()
        page.wait_for_selector(".hit >> nth=2")
        assert page.locator(".chip").is_visible() and "p.png" in page.locator(".chip").inner_text()
        assert looks_of(page) == [hit["file"] for hit in expected]
        page.evaluate("show({})")
    page.set_input_files("[type=file]", {**file, "buffer": b"no picture"})
    page.wait_for_selector("text=This browser cannot read the picture")
    page.goto(f"{server[0]}/?q=a+ring")
    page.wait_for_selector(".hit >> nth=2")
    first, *others = looks_of(page)
    page.click(".hit:first-child >> text=More like this")
    page.wait_for_function("() => document.querySelectorAll('.hit').length == 2")
    assert {*looks_of(page)} == {*others} and first in page.locator(".chip").inner_text()
    page.go_back()
    page.wait_for_selector(".hit >> nth=2")
    assert looks_of(page) == [first, *others] and page.locator(".chip").is_hidden() and not errors


def test_in_a_browser_filters_are_asked_for_and_kept_in_the_address(browser, server):
    page = browser.new_page()
    page.goto(server[0])
    page.click("#filter")
    for name, value in {
        "q": "a ring",
        "and": "at sea",
        "weight": "0.7",
        "not": "snow",
        "newer": "2001-02-03",
    }.items():
        page.fill(f"[name={name}]", value)
    page.check("[name=all]")
    page.press("[name=q]", "Enter")
    page.wait_for_selector(".hit >> nth=2")
    query = "q=a+ring&not=snow&newer=2001-02-03&and=0.7+at+sea&all=1"
    assert page.url == f"{server[0]}/?{query}"
    found, hits = (
        page.locator(".hit").all_inner_texts(),
        json.loads(get(f"{server[0]}/search?{query}")[1])["hits"],
    )
    assert all(f"score {hit['score']:.3f}" in text for hit, text in zip(hits, found, strict=True))
    page.reload()
    page.wait_for_selector(".hit >> nth=2")
    assert page.locator(".hit").all_inner_texts() == found and page.input_value("[name=weight]") == "0.7"


def test_in_a_browser_the_page_is_dark_where_the_system_is_and_fits_360_pixels(browser, server):
    shade = "getComputedStyle(document.body).backgroundColor"
    brightness = f"{shade}.match(/\\d+/g).slice(0, 3).reduce((sum, one) => sum + +one, 0)"
    for scheme, dark in (("dark", True), ("light", False)):
        page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme=scheme)
        page.goto(f"{server[0]}/?q=a+ring&not=snow")  # with its filters
        page.wait_for_selector(".hit >> nth=2")
        page.click(".hit:first-child >> text=Which captions fit")
        page.wait_for_selector(".more li")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert (page.evaluate(brightness) < 150) == dark
        page.click("#theme")
        assert (page.evaluate(brightness) < 150) != dark
        page.reload()
        assert (page.evaluate(brightness) < 150) != dark  # it is remembered
        page.context.close()


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
def test_in_a_browser_another_site_can_neither_read_nor_show_anything(browser, server, host):
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


def test_in_a_browser_a_foreign_name_of_this_machine_is_not_answered(browser, server):
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
    assert page.locator("form").is_hidden() and page.locator("h1 span").inner_text() == "a ring"
    assert page.locator(".strip img").count() == 2
