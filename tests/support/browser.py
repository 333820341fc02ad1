"""A real browser without a window: Debian's chromium, Chrome, or the one that `playwright install chromium` brings."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

#: Set where tests in a browser must not be skipped, as in .github/workflows/ci.yml.
REQUIRED = "FDISTILL_BROWSER" in os.environ
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def running_browser() -> Iterator[Any]:
    """Playwright's browser; skips the test where there is none and none is required."""
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not REQUIRED and (importlib.util.find_spec("playwright") is None or installed is None):
        pytest.skip("needs playwright and chromium; FDISTILL_BROWSER=1 makes this an error")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        opened = running.chromium.launch(executable_path=installed, args=_ARGUMENTS)
        yield opened
        opened.close()
