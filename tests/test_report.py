"""examples/report.py: the page in a browser, what it holds, what it says of folders without a run."""

import base64
import fcntl
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageDraw

from examples.report import run_names


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '"><script>document.title = "taken"</script><img src=x onerror="document.title=\'taken\'">'


class Browser:
    """Headless Chromium, told what to do in DevTools' protocol by a pipe: JSON, a zero byte after each."""

    def __init__(self, profile):
        (reading, self.sending), (self.receiving, writing) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (reading, writing)]  # away from 3 and 4, see below
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run"
        command = f'exec "$0" {flags} --remote-debugging-pipe --user-data-dir="$1" 3<&{theirs[0]} 4>&{theirs[1]}'
        command = ["bash", "-c", command, CHROMIUM, profile]
        self.process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (reading, writing, *theirs):
            os.close(end)
        self.number, self.received, self.session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of a command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.sending, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self):
        while b"\0" not in self.received:
            assert select.select([self.receiving], [], [], 60)[0], "Chromium says nothing"
            data = os.read(self.receiving, 2**16)
            assert data, f"Chromium has ended with {self.process.wait(10)}"
            self.received += data
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, path, width, height, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while self.run("document.readyState") != "complete":
            time.sleep(0.02)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            code = {"ArrowLeft": 37, "ArrowRight": 39}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def mouse(self, kind, x, y):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path, whole=True):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return np.asarray(Image.open(path).convert("RGB"), int)

    def close(self):
        os.close(self.sending)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.receiving)


# The texts that another text covers, that end outside the page or outside the box they are in, or that are cut
LAYOUT_PROBLEMS = """
(() => {
  const lines = [], problems = [], nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (nodes.nextNode()) {
    const node = nodes.currentNode;
    const box = node.parentElement.closest("section, td, th, figure, label, button, h2, body");
    if (!node.data.trim() || !node.parentElement.checkVisibility() || node.parentElement.closest("script")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const inSvg = Boolean(node.parentElement.closest("svg"));
    const bounds = (inSvg ? node.parentElement.closest("section") : box).getBoundingClientRect();
    for (const rect of range.getClientRects()) {
      if (rect.width < 1) continue;
      if (rect.left < 0 || rect.right > innerWidth) problems.push(`outside the page: ${node.data}`);
      if (rect.left < bounds.left - 1 || rect.right > bounds.right + 1) problems.push(`outside its box: ${node.data}`);
      if (rect.top < bounds.top - 1 || rect.bottom > bounds.bottom + 1) problems.push(`cut: ${node.data}`);
      lines.push({ text: node.data, rect });
    }
  }
  lines.forEach(({ text, rect: a }, i) => lines.slice(i + 1).forEach(({ text: other, rect: b }) => {
    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    // lines stand closer than letters may be high
    if (width > 1 && height > 4) problems.push(`${text} overlaps ${other}`);
  }));
  for (const image of document.images) {
    const { left, right } = image.getBoundingClientRect();
    if (image.checkVisibility() && (left < 0 || right > innerWidth)) problems.push("an image is cut");
  }
  return lines.length ? problems : ["no text"];
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def report(*words, **options):
    command = [sys.executable, ROOT / "examples" / "report.py", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def run(tmp_path):
    """The output folder of a run as trainers leave it, of 400 steps with pictures of another color each 100."""
    return written_run(tmp_path / "run <b>& co")


@pytest.fixture
def shorter_run(tmp_path):
    """The output folder of a run of 150 steps with pictures of one color at 0 and 100, and held-out losses."""
    folder = tmp_path / "others" / "dog_rank-16_lr-1e-4_with-prior-preservation_and_captions"
    (folder / "validation").mkdir(parents=True)
    for step in (0, 100):
        Image.new("RGB", (400, 240), "#00cccc").save(folder / "validation" / f"step-{step:06d}.png")
    held_out_run(folder, steps=150, digest="a")
    args = {"pretrained_model_name_or_path": "some/model", "validation_prompt": HOSTILE, "rank": 64, "seed": 0}
    record = {"args": args | {"output_dir": "b"}, "versions": {"torch": "2.13.0", "peft": "0.21.2"}}
    (folder / "args.json").write_text(json.dumps(record))
    return folder


def held_out_run(folder, steps, digest):
    """Writes the metrics of a run with a held-out loss each 50 steps, and a checkpoint that has their data's hash."""
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "loss": 2 / step, "lr": 1e-4}
            if step % 50 == 0:
                row |= {
                    "validation_loss": 10 / step,
                    "validation_loss_0.1": 5 / step,
                    "validation_loss_0.9": 15 / step,
                }
            file.write(json.dumps(row) + "\n")
    (folder / "checkpoint-100").mkdir()
    state = {"global_step": 100, "the hash of the held-out data": digest}
    (folder / "checkpoint-100" / "trainer_state.json").write_text(json.dumps(state))


def written_run(folder):
    (folder / "validation").mkdir(parents=True)
    (folder / "checkpoint-200").mkdir()
    for i, color in enumerate(["#cc0000", "#00aa00", "#0000cc", "#aaaa00", "#aa00aa"]):
        picture = Image.new("RGB", (400, 240), "white")
        ImageDraw.Draw(picture).rectangle((20, 20, 380, 220), fill=color)
        picture.save(folder / "validation" / f"step-{100 * i:06d}.png")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 401):
            row = {"step": step, "loss": 1 / step if step != 7 else float("nan"), "lr": 1e-4, "grad_norm": 0.5}
            file.write(json.dumps(row | {"images_per_second": 8 + step % 2, "peak_memory_gb": 1.25}) + "\n")
        file.write('{"step": 401, "lo')
    args = {"pretrained_model_name_or_path": "some/model", "validation_prompt": HOSTILE, "rank": 16, HOSTILE: HOSTILE}
    record = {"args": args, "versions": {"torch": "2.13.0"}, "marks": {"pivot": 150}, "changed": ["rank"]}
    (folder / "args.json").write_text(json.dumps(record))
    return folder


def color_of(image):
    """The color that most pixels have of those that are far from grey."""
    pixels = image[image.max(-1) - image.min(-1) > 150]
    return f"#{np.bincount(pixels @ [65536, 256, 1]).argmax():06x}"


def test_the_slider_moves_through_the_pictures(browser, run, tmp_path):
    assert report(run).stdout == f"{run / 'report.html'}\n"
    shutil.copy(run / "report.html", tmp_path / "alone.html")  # nothing else may be needed
    browser.open(tmp_path / "alone.html", 1600, 1000)
    shown = lambda: (browser.run("get('at').textContent"), color_of(browser.screenshot(tmp_path / "page.png")))  # noqa: E731
    assert shown() == ("step 400", "#aa00aa")
    browser.press("ArrowLeft")
    assert shown() == ("step 300", "#aaaa00")
    for _ in range(9):
        browser.press("ArrowLeft")
    assert shown() == ("step 0", "#cc0000")
    browser.press("ArrowRight")
    assert shown() == ("step 100", "#00aa00")
    box = browser.run("(({ x, y, width, height }) => ({ x, y, width, height }))(get('step').getBoundingClientRect())")
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert shown() == ("step 200", "#0000cc")
    browser.press("ArrowRight")  # the slider has the focus now and must move by one, not by two
    assert shown() == ("step 300", "#aaaa00")
    browser.run("get('compare').click()")
    page = browser.screenshot(tmp_path / "page.png").reshape(-1, 3).tolist()
    assert all(page.count(color) > 10_000 for color in ([0xCC, 0, 0], [0xAA, 0xAA, 0]))


def test_on_a_phone_an_image_is_read_in_its_full_size_within_its_frame(browser, run):
    report(run)
    browser.open(run / "report.html", 390, 900)
    image = "document.querySelector('#pictures img')"
    whole = browser.run(f"{image}.clientWidth")
    assert whole < 390 < browser.run(f"{image}.naturalWidth") == 400
    box = browser.run(f"(({{ x, y }}) => ({{ x, y }}))({image}.getBoundingClientRect())")
    for width in (400, whole):  # a click on it, and another
        for kind in ("mousePressed", "mouseReleased"):
            browser.mouse(kind, box["x"] + 20, box["y"] + 20)
        assert browser.run(f"{image}.clientWidth") == width
        assert browser.run("document.documentElement.scrollWidth") == 390
        assert browser.run("get('full').checked") == (width == 400)
    mean = browser.run("charts[0].lines[1].values.findLast(value => value != null)")
    tile = browser.run("document.querySelectorAll('.facts div')[1].innerText").split("\n")
    assert tile[1] == "loss, mean of 40" and float(tile[0]) == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])  # of a phone, of a desktop's window
def test_the_page_fits_and_shows_values_under_the_pointer(browser, run, tmp_path, width, scheme):
    report(run)
    browser.open(run / "report.html", width, 900, scheme)
    image = browser.screenshot(tmp_path / "page.png")
    assert image.shape[1] == width
    assert browser.run("document.documentElement.scrollWidth") == width  # nothing to scroll sideways
    assert browser.run(LAYOUT_PROBLEMS) == []
    assert (image[5, 5].mean() < 60) == (scheme == "dark")
    names = browser.run("[...document.querySelectorAll('h2')].map(node => node.firstChild.textContent)")
    curves = ["loss", "learning rate", "gradient norm", "images per second", "peak memory, GiB"]
    assert names == ["Validation", *curves, "Settings", "Files", "Versions"]
    assert browser.run("document.querySelector('#loss').textContent.includes('pivot, step 150')")
    browser.run("get('loss').scrollIntoView()")
    box = browser.run("(({ x, y }) => ({ x, y }))(charts[0].svg.getBoundingClientRect())")
    x = browser.run("charts[0].x(250)")
    browser.mouse("mouseMoved", box["x"] + x, box["y"] + 50)
    assert browser.run("charts.map(chart => chart.where.textContent)") == ["step 250"] * 5
    assert float(browser.run("charts[0].values[0].textContent")) == pytest.approx(1 / 250, rel=0.01)
    assert float(browser.run("charts[1].values[0].textContent")) == 1e-4
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, box["x"] + x + 10, box["y"] + 50)
    assert browser.run("get('at').textContent") == "step 300"  # a click takes the slider along


def test_words_of_the_run_stay_words_and_nothing_is_fetched(browser, run):
    report(run)
    browser.open(run / "report.html", 1600, 900)
    assert browser.run("document.title") == run.name
    cells = "[...document.querySelectorAll('#settings td')].map(node => node.textContent)"
    assert browser.run(cells).count(HOSTILE) == 2
    assert browser.run("document.querySelector('#settings tr').textContent") == "rank16"  # changed ones first
    urls = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [browser.run("location.href")]
    assert not [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]


def test_a_page_without_pictures_and_settings(browser, tmp_path):
    rows = [{"step": 1, "loss": math.nan, "lr": 0.1}, {"step": 2, "loss": 0.5, "lr": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "step-000002.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    result = report(tmp_path)
    assert result.returncode == 0
    assert "step-000002.png: left out" in result.stderr
    browser.open(tmp_path / "report.html", 800, 600)
    assert browser.run("get('images').checkVisibility()") is False
    assert browser.run("charts[0].values[0].textContent") == "0.5"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_runs_are_compared_in_one_page_that_fits(browser, run, shorter_run, tmp_path, width, scheme):
    page = tmp_path / "pages" / "comparison.html"
    third = tmp_path / "third"
    third.mkdir()
    (third / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "lr": 0.1}\n')
    result = report(run, shorter_run, third, "--output", page)
    assert result.stdout == f"{page}\n", result.stderr
    assert not (run / "report.html").exists()
    browser.open(page, width, 900, scheme)
    image = browser.screenshot(tmp_path / "page.png")
    assert image.shape[1] == width == browser.run("document.documentElement.scrollWidth")
    assert browser.run("document.querySelectorAll('details').forEach(node => { node.open = true; })") is None
    assert browser.run(LAYOUT_PROBLEMS) == []
    assert (image[5, 5].mean() < 60) == (scheme == "dark")
    urls = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [browser.run("location.href")]
    assert not [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]


def test_compared_runs_have_a_line_each_and_images_of_the_same_step(browser, run, shorter_run):
    report(run, shorter_run)  # the page is that of the first
    browser.open(run / "comparison.html", 1280, 900)
    names = [run.name, shorter_run.name]
    assert browser.run("runs.map(run => run.name)") == names
    titles = browser.run("charts.map(chart => chart.svg.getAttribute('aria-label'))")
    assert titles[:4] == ["loss", "held-out loss", "held-out loss, σ 0.1", "held-out loss, σ 0.9"]
    strokes = browser.run("[...charts[0].svg.querySelectorAll('path')].map(node => node.getAttribute('stroke'))")
    assert len(strokes) == len(set(strokes)) == 2
    held_out = browser.run("charts[1].lines.map(({ steps, values }) => [steps, values])")
    assert held_out == [[[50, 100, 150], [10 / 50, 10 / 100, 10 / 150]]]
    captions = "[...document.querySelectorAll('figcaption')].map(node => node.lastChild.textContent)"
    assert browser.run(captions) == ["step 400", "step 100"]  # the shorter run's latest
    faded = "[...document.querySelectorAll('figure img')].map(node => node.className)"
    assert browser.run(faded) == ["", "other"]
    for _ in range(3):
        browser.press("ArrowLeft")
    assert browser.run(captions) == ["step 100", "step 100"]
    assert browser.run(faded) == ["", ""]
    browser.run("get('loss').scrollIntoView()")
    box = browser.run("(({ x, y }) => ({ x, y }))(charts[0].svg.getBoundingClientRect())")
    browser.mouse("mouseMoved", box["x"] + browser.run("charts[0].x(250)"), box["y"] + 50)
    assert browser.run("charts[0].values[1].textContent") == "-"  # the shorter run has ended
    assert float(browser.run("charts[0].values[0].textContent")) < 0.1


def test_compared_runs_show_the_settings_that_differ(browser, run, shorter_run):
    report(run, shorter_run)
    browser.open(run / "comparison.html", 1280, 900)
    table = "document.querySelector('#settings > table')"
    rows = browser.run(f"[...{table}.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText))")
    assert rows == [["rank", "16", "64"]]  # neither the equal prompt and model nor the folders
    text = browser.run("document.querySelector('#settings').textContent")
    assert all(word in text for word in ("seed", "version of peft", "validation_prompt"))
    assert browser.run("document.title") == f"{run.name}, {shorter_run.name}"  # and not what HOSTILE says


@pytest.mark.parametrize("digest, expected", [("a", "the same images"), ("b", "do not compare"), (None, "")])
def test_held_out_losses_are_said_to_compare_if_they_do(shorter_run, tmp_path, digest, expected):
    other = tmp_path / "other"
    other.mkdir()
    held_out_run(other, steps=150, digest=digest)
    assert report(shorter_run, other).returncode == 0
    said = re.search('<p id="held-out">(.*)</p>', (shorter_run / "comparison.html").read_text())[1]
    assert expected in said and bool(expected) == bool(said)


def test_runs_of_one_name_bear_their_parents(tmp_path):
    folders = [tmp_path / name for name in ("a/lora", "b/lora", "b/c")]
    assert run_names(folders) == ["a/lora", "b/lora", "b/c"]
    assert run_names(folders[1:]) == ["lora", "c"]


def test_what_cannot_be_compared_is_named_at_once(run, tmp_path):
    result = report(run, tmp_path / "none", tmp_path / "nowhere", "--output", tmp_path)
    assert result.returncode == 2
    words = ("--output", "none: no such folder", "nowhere: no such folder")
    assert all(word in result.stderr for word in words), result.stderr
    assert "given twice" in report(run, run).stderr
    assert not (run / "report.html").exists()


def test_long_runs_and_large_pictures_stay_a_small_page(run):
    rows = [json.dumps({"step": s, "loss": 1 / s, "lr": 1e-4, "grad_norm": 1 / s}) for s in range(1, 50_001)]
    (run / "metrics.jsonl").write_text("\n".join(rows))
    noise = np.random.default_rng(0).integers(0, 256, (1024, 4096, 3), np.uint8)
    Image.fromarray(noise).save(run / "validation" / "step-050000.png")
    assert report(run).returncode == 0
    text = (run / "report.html").read_text()
    assert len(text) < 6_000_000 < (run / "validation" / "step-050000.png").stat().st_size
    data = json.loads(re.search('id="data">(.*)</script>', text)[1])
    assert len(data["steps"]) <= 3000
    assert data["images"][-1]["src"].startswith("data:image/webp")


@pytest.mark.parametrize(
    "content, expected",
    [(None, "no such folder"), ({}, "no metrics.jsonl"), ({"metrics.jsonl": "\n{"}, "no metrics.jsonl")],
)
def test_a_folder_without_a_run_is_one_line(tmp_path, content, expected):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    result = report(folder)
    assert result.returncode == 2
    assert result.stderr.startswith(f"report.py: error: {folder}: {expected}")
    assert result.stderr.count("\n") == 1
    assert not (folder / "report.html").exists()
