"""Notebooks in JupyterLab, in headless Chromium: clips play in the outputs of cells, and progress is one bar."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from dit_video.scenes import shapes
from dit_video.tokens import Grid
from support.chromium import open_chromium

pytest.importorskip("playwright")
pytest.importorskip("jupyterlab")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "experiments" / "notebooks"
TOKEN = "a-token-of-the-test"
SECONDS = 180
"""Time limit of starting the server, opening a notebook and running it."""
PIXELS = """video => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const context = canvas.getContext("2d");
    context.drawImage(video, 0, 0);
    return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
}"""
"""Function from a video element to the values of the frame that it shows."""
BARS = """
import time
from dit_video.training.hooks.logging import Progress
with Progress("waiting", 40) as progress:
    for step in range(1, 41):
        time.sleep(0.1)
        progress.update(step, 1 / step)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    """Return headless Chromium."""
    with open_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Return the address of a JupyterLab with settings of its own, and the folder that it serves."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"HOME": home, "JUPYTER_CONFIG_DIR": home, "JUPYTER_DATA_DIR": home, "JUPYTER_RUNTIME_DIR": home}
    variables = {**names, "DIT_VIDEO_RUN": ROOT / "experiments/pretrained/shapes", "PYTHONPATH": ROOT}
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", f"--port={port}", "--ip=127.0.0.1"]
    options += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"]
    with (home / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=os.environ | {name: str(value) for name, value in variables.items()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for_server(server, f"http://127.0.0.1:{port}/api?token={TOKEN}", home / "log.txt")
            yield f"http://127.0.0.1:{port}", folder
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=30)


def wait_for_server(server, address, log):
    """Return once the server answers."""
    for _ in range(SECONDS):
        if server.poll() is not None:
            break
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return
    pytest.fail(f"JupyterLab does not start:\n{log.read_text()}")


@pytest.fixture
def open_notebook(browser, lab):
    """Return a function that opens a notebook in a new window and returns its page."""
    address, folder = lab
    pages = []

    def open_page(notebook, name):
        nbformat.write(notebook, folder / name)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        pages.append(page)
        page.set_default_timeout(1000 * SECONDS)
        page.goto(f"{address}/doc/tree/{name}?token={TOKEN}")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.context?.isReady")
        return page

    yield open_page
    for page in pages:
        page.close()


def run_all(page):
    """Run all cells, and return once the last one has ended."""
    page.wait_for_function(
        "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.connectionStatus === 'connected'"
    )
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(
        """() => {
            const cells = window.jupyterapp.shell.currentWidget.content.widgets;
            const code = cells.filter(cell => cell.model.type === "code");
            return code.every(cell => cell.model.executionCount !== null && cell.model.executionState !== "running");
        }"""
    )


def assert_plays(video):
    """Raise unless a video element plays, without being asked to, and its picture changes."""
    video.scroll_into_view_if_needed()
    plays = "!video.paused && video.readyState >= 2"
    video.evaluate(f"video => new Promise(done => {plays} ? done() : video.onplaying = done)")
    assert video.evaluate("video => [video.error, video.paused, video.loop, video.muted]") == [None, False, True, True]
    first_time, first = video.evaluate("video => video.currentTime"), video.evaluate(PIXELS)
    for _ in range(50):
        time.sleep(0.1)
        is_later = video.evaluate("video => video.currentTime") != first_time
        if is_later and video.evaluate(PIXELS) != first:
            return
    pytest.fail("the video does not play")


def read_notebook(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def make_notebook(*sources):
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources], metadata=metadata)


def test_clips_play_in_the_outputs_of_the_sampling_notebook(open_notebook, tmp_path):
    notebook = read_notebook("sample")
    notebook.cells = notebook.cells[: [cell.id for cell in notebook.cells].index("many-clips") + 1]
    page = open_notebook(notebook, "sample.ipynb")
    run_all(page)
    videos = page.query_selector_all(".jp-OutputArea-output video")
    assert len(videos) == 4
    for video in videos:
        assert_plays(video)
        assert video.bounding_box()["height"] >= 192
    assert page.query_selector(".jp-OutputArea-output[data-mime-type*=error]") is None
    videos[0].scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "sample.png")


def test_a_clip_of_an_untrusted_notebook_plays_too(open_notebook, tmp_path):
    """JupyterLab sanitizes the outputs of a notebook that was executed elsewhere, and keeps an inline video."""
    clip = shapes.render_example(0, seed=1, sizes=(Grid(17, 32, 48),))
    output = nbformat.v4.new_output("execute_result", {"text/html": clip._repr_html_()}, execution_count=1)
    notebook = make_notebook("clip")
    notebook.cells[0].update(execution_count=1, outputs=[output])
    page = open_notebook(notebook, "untrusted.ipynb")
    video = page.wait_for_selector(".jp-OutputArea-output video")
    assert not page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets[0].model.trusted")
    assert_plays(video)
    page.screenshot(path=tmp_path / "untrusted.png")


def test_progress_in_a_cell_is_one_bar_that_fills(open_notebook, tmp_path):
    page = open_notebook(make_notebook(BARS), "bars.ipynb")
    page.wait_for_function(
        "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.connectionStatus === 'connected'"
    )
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    output = page.wait_for_selector(".jp-OutputArea-output :text('waiting')")
    texts = set()
    while "100%" not in (text := output.inner_text()):
        texts.add(text)
        time.sleep(0.2)
        output = page.wait_for_selector(".jp-OutputArea-output :text('waiting')")
    page.screenshot(path=tmp_path / "bars.png")
    assert len(texts) > 5
    assert page.locator(".jp-OutputArea-output").count() == 1
    assert "waiting 40/40 (100%) · loss 0.0250" in text
