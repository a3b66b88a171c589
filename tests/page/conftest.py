"""Fixtures of the page's tests: a browser, and pages that report every violation of their Content-Security-Policy."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.support.browsers import CHROMIUM
from tests.support.demo import create_key, create_tenant
from tests.support.pages import OpenPage
from tests.support.processes import Daybook
from tests.support.rest import Rest

collect_ignore = [] if CHROMIUM else ["test_page.py", "test_page_states.py", "test_reference.py"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium. Until it is closed, the event loop of its driver runs in this thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens an address in a new session of the browser, with a width and a colour scheme.

    At the end, no page may have reported an error or a violation of its policy. An unsuccessful response isn't one.
    """
    problems: list[str] = []
    contexts = []

    def note(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not message.text.startswith("Failed to load resource"):
            problems.append(message.text)

    def open_page(address: str, *, width: int = 1440, height: int = 1000, scheme: str = "light") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
            permissions=["clipboard-read", "clipboard-write"],
            reduced_motion="reduce",
            timezone_id="Pacific/Auckland",
        )
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture(scope="module")
def tenant(gateway: Daybook) -> Rest:
    """A caller of a new tenant without accounts."""
    slug = f"page-{uuid.uuid4()}"

    def create() -> str:
        create_tenant(gateway, slug)
        return create_key(gateway, slug)

    # In another thread, because this one may have the event loop of the browser's driver.
    with ThreadPoolExecutor(1) as executor:
        return Rest(gateway.origin, executor.submit(create).result())
