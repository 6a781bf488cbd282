"""A real browser for tests of the page, if one is installed."""

from __future__ import annotations

import contextlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-quic",
)  # fmt: skip


def chromium():
    """Returns the program; skips the test if it, or the library that drives it, is missing."""
    pytest.importorskip("playwright", reason='no playwright: pip install "edgemoe[page-test]"')
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return program


@contextlib.contextmanager
def browser():
    """Starts a headless browser."""
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        yield found
        found.close()


class Seen:
    """A page in a context of its own, and what went wrong on it: errors, and requests to other hosts."""

    def __init__(self, found, url, **how):
        self.context = found.new_context(**{"viewport": {"width": 1280, "height": 860}, **how})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.url, self.wrong = url, []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.context.route("**/*", self._request)
        self.page.goto(url + "/", wait_until="domcontentloaded")

    def _console(self, message):
        # A request that the server refuses is answered; that is no fault of the page.
        if message.type == "error" and "the server responded with" not in message.text:
            self.wrong.append(message.text)

    def _request(self, route):
        if route.request.url.startswith((self.url + "/", "blob:" + self.url)):
            route.continue_()
        else:
            self.wrong.append(f"asks {route.request.url}")
            route.abort()


@contextlib.contextmanager
def seen(found, url, **how):
    """Opens a page, and checks at the end that nothing went wrong on it."""
    it = Seen(found, url, **how)
    try:
        yield it.page
        assert not it.wrong
    finally:
        it.context.close()
