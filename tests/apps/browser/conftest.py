"""The studio of the shipped model in a process of its own, and users of it in headless Chromium."""

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from dit_video.video import Clip
from support.chromium import open_chromium

pytest.importorskip("starlette")
pytest.importorskip("playwright")

ROOT = Path(__file__).resolve().parents[3]
MODEL = "experiments/pretrained/shapes"
PATIENCE = 90
"""Seconds that a test waits for a clip, whose program may have to be compiled first."""
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""Environment in which less is optimised: that takes longer than a clip of this size takes to be sampled."""
ACTIVE = ("waiting", "preparing", "sampling", "decoding")


@pytest.fixture(scope="session")
def address(tmp_path_factory) -> Iterator[str]:
    """Return the address of a studio, which all tests share: every user has a gallery of its own."""
    folder = tmp_path_factory.mktemp("studio")
    log = folder / "log.txt"
    command = [sys.executable, "-m", "dit_video.web", MODEL, "--port", "0", "--out", str(folder / "out"), "--no-cache"]
    environment = os.environ | QUICK
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield wait_until(lambda: re.search(r"http://\S+", log.read_text()) or server.poll() is not None, log)[0]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    """Return headless Chromium."""
    with open_chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def make_studio(address) -> Callable[..., "Studio"]:
    """Return a function that opens the studio in a context of the browser."""

    def make(context, path: str = "", address: str = address) -> Studio:
        studio = Studio(context, address)
        studio.open(path)
        return studio

    return make


@pytest.fixture
def open_studio(browser, make_studio) -> Iterator[Callable[..., "Studio"]]:
    """Return a function that opens the studio as a new user; the errors of all pages are checked in the end."""
    studios = []

    def open_page(path: str = "", *, address: str | None = None, **options) -> Studio:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        studios.append(make_studio(context, path, **({} if address is None else {"address": address})))
        return studios[-1]

    yield open_page
    for studio in studios:
        studio.context.close()
    assert [error for studio in studios for error in studio.errors] == []


@pytest.fixture
def studio(open_studio) -> "Studio":
    """Return the studio, opened by a new user."""
    return open_studio()


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory) -> Path:
    """Return an mp4 file of 17 frames of 64×96 pixels: a bright square moves over a dark ground."""
    frames = np.full((17, 96, 64, 3), (17, 18, 29), np.uint8)
    for index, frame in enumerate(frames):
        frame[30 + 2 * index : 50 + 2 * index, 20:40] = (70, 90, 240)
    path = tmp_path_factory.mktemp("clips") / "square.mp4"
    Clip(frames, fps=8).save(path)
    return path


@pytest.fixture(scope="session")
def image_file(clip_file) -> Path:
    """Return a PNG file of 32×48 pixels: a red square on a dark ground."""
    frame = np.full((1, 48, 32, 3), (17, 18, 29), np.uint8)
    frame[:, 8:20, 8:20] = (240, 60, 50)
    path = clip_file.with_name("square.png")
    Clip(frame, fps=1).save(path)
    return path


@pytest.fixture
def run_python() -> Callable[[str, Path], None]:
    """Return a function that runs code in another process, in a folder in which the model has its relative path."""

    def run(code: str, folder: Path) -> None:
        (folder / "experiments").symlink_to(ROOT / "experiments")
        environment = os.environ | QUICK | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, timeout=PATIENCE)

    return run


@pytest.fixture(scope="session")
def read_animation() -> Callable[[bytes], np.ndarray]:
    """Return a function that decodes an APNG file to frames `[T H W 3]`."""

    def read(content: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(content)) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])

    return read


def wait_until(condition: Callable[[], object], subject: object = "", seconds: float = PATIENCE):
    """Return the first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"did not happen within {seconds} s: {subject}"
        time.sleep(0.05)
    return value


class Studio:
    """A user of the studio in a browser."""

    def __init__(self, context, address: str):
        self.context = context
        self.address = address
        self.errors: list[str] = []
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # Violations of the content security policy are said in the console alone.
        self.page.on("console", lambda line: "Security Policy" in line.text and self.errors.append(line.text))

    def open(self, path: str = "") -> None:
        """Open the page, and wait for its form."""
        self.page.goto(self.address + path)
        self.page.locator("[role=tab][aria-selected=true]").wait_for()

    def reload(self) -> None:
        """Load the page again."""
        self.page.reload()
        self.page.locator("[role=tab][aria-selected=true]").wait_for()

    def get(self, path: str):
        """Return the JSON value at an address of this user."""
        return self.context.request.get(self.address + path).json()

    @property
    def jobs(self) -> list[dict]:
        """Return the jobs of this user, as the server has them."""
        return self.get("api/state")["jobs"]

    @property
    def has_active_jobs(self) -> bool:
        """Return whether a job of this user waits or runs."""
        return any(job["status"] in ACTIVE for job in self.jobs)

    def cancel(self, job: dict) -> None:
        """Cancel a job without the page."""
        self.context.request.delete(f"{self.address}api/jobs/{job['id']}", headers={"Origin": self.address[:-1]})

    def wait_until_idle(self) -> None:
        """Wait until no job of this user waits or runs."""
        wait_until(lambda: not self.has_active_jobs, "jobs")

    @property
    def items(self) -> list[dict]:
        """Return the items of this user's gallery, as the server has them."""
        return self.get("api/items")["items"]

    def read(self, path: str) -> bytes:
        """Return the file at a path of the server."""
        response = self.context.request.get(self.address + path)
        assert response.ok
        return response.body()

    def read_file(self, item: dict) -> bytes:
        """Return the lossless file of an item."""
        return self.read(item["files"]["apng"])

    def select_tab(self, name: str) -> None:
        """Choose a tab."""
        self.page.locator(f"#tab-{name}").click()

    def field(self, name: str):
        """Return the element of a field of the tab that is open, or of those that all tabs share."""
        return self.page.locator(f'[data-field="{name}"]:visible')

    def fill(self, name: str, value: object) -> None:
        """Write into the field of a text or a number."""
        self.field(name).locator("input:not([type=range]), textarea").fill(str(value))

    def fill_axis(self, title: str, value: int) -> None:
        """Write into a part of the field of a size."""
        self.field("size").get_by_label(title).fill(str(value))

    def list_tabs(self) -> list[str]:
        """Return the names of the page's tabs."""
        return [tab.get_attribute("id").removeprefix("tab-") for tab in self.page.get_by_role("tab").all()]

    def fill_sampling(self, name: str, value: object) -> None:
        """Write into a field of the part that opens."""
        self.page.locator("details.sampling").evaluate("(details) => { details.open = true; }")
        self.fill(name, value)

    def upload(self, name: str, path: Path) -> None:
        """Choose a file in the field of a clip or an image, and wait until the server has read it."""
        self.field(name).locator("input[type=file]").set_input_files(path)
        self.field(name).locator(".chosen").wait_for()

    def pick(self, name: str, number: int = 0) -> None:
        """Choose an item of the gallery, 0 for the newest, in the field of a clip or an image."""
        self.field(name).get_by_role("button", name="Gallery").click()
        self.page.locator("dialog .open").nth(number).click()
        self.field(name).locator(".chosen").wait_for()

    def press_generate(self) -> None:
        """Press the button."""
        self.page.locator("#form button[type=submit]").click()

    def generate(self) -> dict:
        """Press the button, wait for the clip, and return the newest item."""
        count = self.page.locator("#gallery .item-card").count()
        self.press_generate()
        return self.wait_for_items(count + 1)[0]

    def wait_for_items(self, count: int) -> list[dict]:
        """Wait until the page's gallery has so many items, and return them; a job that fails ends it."""

        def is_done() -> bool:
            errors = self.page.locator(".warning:visible, .error:visible").all_inner_texts()
            assert errors == []
            return self.page.locator("#gallery .item-card").count() >= count

        wait_until(is_done, f"{count} items")
        return self.items

    def make_clip(self, prompt: str = "a red circle moves to the right", *, seed: int = 0, steps: int = 8) -> dict:
        """Generate a clip from a text, and return its item."""
        self.select_tab("text_to_video")
        self.fill("prompt", prompt)
        self.fill("seed", seed)
        self.fill_sampling("steps", steps)
        return self.generate()

    def start_long(self, prompt: str = "a red circle") -> None:
        """Start a clip of as many steps as the studio allows."""
        self.fill("prompt", prompt)
        self.fill_sampling("steps", 1000)
        self.press_generate()

    def check_plays(self, selector: str = "#stage video") -> None:
        """Check that a video plays: its time goes on, and the pixels that it shows change."""
        video = self.page.locator(selector)
        video.wait_for()
        seen = []

        def plays() -> bool:
            seen.append(video.evaluate(READ_VIDEO))
            return len({time for time, _ in seen}) > 2 and len({pixels for _, pixels in seen}) > 2

        wait_until(plays, selector, 15)


READ_VIDEO = """(video) => {
    if (video.readyState < 2) return [0, ""];
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const context = canvas.getContext("2d");
    context.drawImage(video, 0, 0);
    return [video.currentTime, context.getImageData(0, 0, canvas.width, canvas.height).data.join()];
}"""
