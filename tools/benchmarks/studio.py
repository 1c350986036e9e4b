"""Time until the studio's page is there, and from the first click until a video plays in headless Chromium."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import sync_playwright

import dit_video
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.loading import read_config

_MAX_SECONDS = 120
_PLAYS = "[...document.querySelectorAll('video')].some((video) => video.currentTime > 0)"


def measure(run: Path) -> dict[str, Any]:
    """Measure a start without kept programs, and one with the first one's; the click follows the page at once.

    Args:
      run: Folder of a run or of a pipeline.
    """
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        return {name: _measure_start(run, Path(folder)) for name in ("first start", "with kept programs")}


def _measure_start(run: Path, folder: Path) -> dict[str, float]:
    """Return seconds until the page is there, and from the click to a playing video: of two clips."""
    command = [sys.executable, "-m", "dit_video.web", str(run), "--port", "0", "--out", str(folder / "studio")]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    root = Path(dit_video.__file__).parents[1]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        httpx.get(address, timeout=_MAX_SECONDS).raise_for_status()
        figures = {"seconds until the page": time.perf_counter() - start}
        config = read_config(run)
        evaluation = (config.evaluation if config else None) or CaptionEvaluation()
        prompt = next(iter((*evaluation.example_prompts, "a prompt")))
        return figures | _measure_clicks(address, prompt)
    finally:
        server.terminate()
        server.wait(_MAX_SECONDS)


def _measure_clicks(address: str, prompt: str) -> dict[str, float]:
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
        if not Path(path).exists():
            path = shutil.which("chromium") or shutil.which("google-chrome") or path
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        seconds = {}
        for name in ("first click", "second click"):
            page = browser.new_page()  # of a new user, without clips in the gallery
            page.set_default_timeout(1000 * _MAX_SECONDS)
            page.goto(address)
            page.get_by_role("textbox", name="Prompt", exact=True).fill(prompt)
            start = time.perf_counter()
            page.get_by_role("button", name="Generate").click()
            while not page.evaluate(_PLAYS):  # the page's policy forbids what wait_for_function does
                time.sleep(0.02)
            seconds[f"seconds from the {name} to a playing video"] = time.perf_counter() - start
        browser.close()
    return seconds
