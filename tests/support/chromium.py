"""Headless Chromium for tests of pages."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def open_chromium() -> Iterator[Any]:
    """Open headless Chromium: that of playwright, or of the system; skip the test where there is none.

    Close it with the file of tests: playwright cannot be started twice in a process, nor beside `asyncio.run`.
    """
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        path = playwright.chromium.executable_path
        if not Path(path).exists():
            path = shutil.which("chromium") or shutil.which("google-chrome")
        if path is None:
            pytest.skip("no Chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # a test may run as root
        yield browser
        browser.close()
