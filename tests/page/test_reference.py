"""The reference at /docs in a real browser, in front of the demo."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from tests.support.openapi import NATIVE, VENDORS, document
from tests.support.pages import OpenPage
from tests.support.processes import Daybook

KEY = "demo-dreadnode.public"


@pytest.mark.parametrize("api", [NATIVE, *VENDORS])
def test_reference_shows_every_operation(gateway: Daybook, open_page: OpenPage, api: str) -> None:
    """The page shows the title and each operation of a document, chosen in the list of the documents."""
    shown = document(api)
    page = open_page(f"{gateway.origin}/docs")
    page.locator("#api").select_option(shown["info"]["title"])
    expect(page.locator(".info .title")).to_contain_text(shown["info"]["title"])
    expected = {(verb.upper(), path) for path, operations in shown["paths"].items() for verb in operations}
    expect(page.locator(".opblock")).to_have_count(len(expected))
    found = zip(
        page.locator(".opblock-summary-method").all_text_contents(),
        page.locator(".opblock-summary-path").all_text_contents(),
        strict=True,
    )
    # Zero-width spaces say where a line may break.
    assert {(verb, path.replace("\u200b", "")) for verb, path in found} == expected
    expect(page.locator(".errors-wrapper")).to_have_count(0)


def execute(page: Page, operation: str, **parameters: str) -> None:
    """Opens an operation and calls it with these parameters."""
    block = page.locator(f"#operations-{operation}")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    for name, value in parameters.items():
        block.locator(f'tr[data-param-name="{name}"] input').fill(value)
    block.get_by_role("button", name="Execute").click()


def test_reference_calls_the_api(gateway: Daybook, open_page: OpenPage) -> None:
    """A reader enters a key and calls the API; nothing is sent to another host."""
    page = open_page("about:blank")
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(f"{gateway.origin}/docs")
    page.locator(".auth-wrapper .authorize").first.click()
    bearer = page.locator(".auth-container", has_text="bearer")
    bearer.get_by_label("auth-bearer-value").fill(KEY)
    bearer.get_by_role("button", name="Apply credentials").click()
    page.get_by_role("button", name="Close").last.click()
    execute(page, "Ledger-GetBalance", account="example")
    answer = page.locator("#operations-Ledger-GetBalance .live-responses-table")
    expect(answer).to_contain_text('"name": "accounts/example/balance"')
    assert hosts == {urlsplit(gateway.origin).netloc}


def test_reference_keeps_no_key(gateway: Daybook, open_page: OpenPage) -> None:
    """Without a key the API answers 401, which the page shows."""
    page = open_page(f"{gateway.origin}/docs?api=/openapi/teable.json")
    execute(page, "Billing-GetSpaceCreditHistory")
    answer = page.locator("#operations-Billing-GetSpaceCreditHistory .live-responses-table")
    expect(answer).to_contain_text("401")
    expect(answer).to_contain_text("unauthorized")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reference_follows_the_color_scheme(gateway: Daybook, open_page: OpenPage, scheme: str) -> None:
    """The page is dark if the reader prefers that, and fits a window of 360 pixels."""
    page = open_page(f"{gateway.origin}/docs", width=360, scheme=scheme)
    expect(page.locator(".opblock").first).to_be_visible()
    expect(page.locator("html")).to_have_class(re.compile("dark-mode" if scheme == "dark" else "^$"))
    assert page.evaluate("document.documentElement.scrollWidth") == 360
