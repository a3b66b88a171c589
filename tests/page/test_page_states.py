"""How the page looks and behaves: widths, colours, keyboard, screen readers, errors, empty and long lists."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.support.gateways import away, crowded
from tests.support.pages import OpenPage, address, key_of
from tests.support.processes import ROOT, Daybook
from tests.support.rest import Rest

STUDIO = "studio-north"
VIEWS = {
    "key": None,
    "overview": "/",
    "account": f"/accounts/{STUDIO}?lots=all",
    "filtered": f"/accounts/{STUDIO}?kind=CHARGE&category=video_render",
    "empty": "/accounts/quiet-library",
    "missing": "/accounts/nowhere",
}
WIDTHS = (360, 768, 1440)
SCHEMES = ("light", "dark")
FOLDER = ROOT / "docs" / "page"
SCREENSHOT_BYTES_MAX = 150_000


def settled(page: Page) -> Page:
    """The page when it has loaded all its parts."""
    page.wait_for_load_state("networkidle")
    expect(page.locator("[aria-busy]")).to_have_count(0)
    return page


def refund(gateway: Daybook) -> str:
    """The route of the refund of the demo's studio."""
    body: Any = Rest(gateway.origin, "demo-teams.public").call(
        "GET", f"/v1/accounts/{STUDIO}/transactions?filter=kind%20%3D%20REFUND"
    )
    return f"/{body['transactions'][0]['refundOf']}"


def routes(gateway: Daybook) -> dict[str, str]:
    """The address of each view."""
    found = {
        name: f"{gateway.origin}/" if route is None else address(gateway.origin, route) for name, route in VIEWS.items()
    }
    return {**found, "charge": address(gateway.origin, refund(gateway))}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_no_problem(gateway: Daybook, open_page: OpenPage, scheme: str) -> None:
    """In no view does axe-core find a violation, such as a field without a label. In the dark only contrast differs."""
    axe = Axe()
    rules = {"resultTypes": ["violations"], **({"runOnly": ["color-contrast"]} if scheme == "dark" else {})}
    page = open_page(f"{gateway.origin}/", scheme=scheme)
    for name, found in routes(gateway).items():
        if scheme == "dark" and name not in {"key", "account", "missing"}:
            continue
        page.goto(found)
        settled(page)
        results = axe.run(page, options=rules)
        assert results.violations_count == 0, f"{name}: {results.generate_report()}"


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(gateway: Daybook, open_page: OpenPage, width: int) -> None:
    """No view scrolls sideways, and no table is wider than its section."""
    page = open_page(f"{gateway.origin}/", width=width, height=800)
    for name, found in routes(gateway).items():
        page.goto(found)
        settled(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width, name
        too_wide = page.evaluate(
            "[...document.querySelectorAll('section, dl')].filter(each => each.scrollWidth > each.clientWidth).length"
        )
        assert too_wide == 0, name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_screenshot_is_drawn(gateway: Daybook, open_page: OpenPage, tmp_path: Path, width: int, scheme: str) -> None:
    """The page is drawn in each width and colour scheme. WRITE_SCREENSHOTS=1 keeps the pictures in docs/."""
    height = {360: 780, 768: 1024, 1440: 1000}[width]
    page = open_page(address(gateway.origin, f"/accounts/{STUDIO}"), width=width, height=height, scheme=scheme)
    settled(page)
    expect(page.locator(".plot svg")).to_be_visible()
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    brightness = sum(int(each) for each in re.findall(r"\d+", background)[:3]) / 3
    assert (brightness > 128) == (scheme == "light")
    folder = FOLDER if os.environ.get("WRITE_SCREENSHOTS") else tmp_path
    picture = page.screenshot(path=folder / f"{width}-{scheme}.png")
    assert 10_000 < len(picture) < SCREENSHOT_BYTES_MAX


def test_kept_screenshots_are_complete() -> None:
    """docs/page has a picture of each width and colour scheme, and no other."""
    kept = {each.name: each.stat().st_size for each in FOLDER.glob("*.png")}
    assert kept.keys() == {f"{width}-{scheme}.png" for width in WIDTHS for scheme in SCHEMES}
    assert max(kept.values()) < SCREENSHOT_BYTES_MAX


def test_keyboard_is_enough(gateway: Daybook, open_page: OpenPage) -> None:
    """Without a mouse: skip to the content, find an account, open a transaction, and return; the focus is visible."""
    page = open_page(address(gateway.origin))
    settled(page)
    press = page.keyboard.press

    def focused() -> str:
        text: str = page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText")
        return text

    def tab_to(name: str) -> None:
        for _ in range(60):
            press("Tab")
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", focused()
            if name in focused():
                return
        raise AssertionError(f"Tab never reaches {name}")

    press("Tab")
    assert focused() == "Skip to content"
    press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    assert page.url == f"{gateway.origin}/#/"
    page.get_by_label("Find an account").focus()
    page.keyboard.type("north")
    press("ArrowDown")
    assert focused().startswith("Studio North")
    press("Enter")
    expect(page.get_by_role("heading", name="Studio North")).to_be_focused()
    settled(page)
    tab_to("2024-12-02")
    press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Charge")
    settled(page)
    tab_to("Copy: Transaction")
    press("Enter")
    expect(page.get_by_role("button", name="Copy: Transaction")).to_have_text("Copied")
    page.go_back()
    expect(page.get_by_role("heading", name="Studio North")).to_be_focused()


def test_exact_id_opens_an_account(gateway: Daybook, open_page: OpenPage) -> None:
    """An id opens its account also if the list of accounts doesn't have it."""
    page = open_page(address(gateway.origin, "/", "demo-nebulablock.public"))
    panel = page.locator(".finder").get_by_role("alert")
    expect(panel).to_contain_text("the credential is not for accounts/-")
    expect(panel).to_contain_text("This key is bound to one account. Open that account by its id.")
    page.get_by_label("Find an account").fill("266")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="User 266")).to_be_visible()
    expect(page.locator(".figures dd").first).to_have_text("9.8682")


def test_refused_key_is_asked_for_again(gateway: Daybook, open_page: OpenPage) -> None:
    """A 401 shows the API's words and asks for another key, which opens the same view."""
    page = open_page(address(gateway.origin, f"/accounts/{STUDIO}", "demo-teams.wrong"))
    expect(page.get_by_role("alert")).to_contain_text("the credential is not valid")
    expect(page.get_by_role("alert")).to_contain_text("CREDENTIAL_INVALID")
    page.get_by_label("API key").fill("demo-teams.public")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Studio North")).to_be_visible()


def test_missing_scope_hides_only_its_part(gateway: Daybook, open_page: OpenPage) -> None:
    """A key that may not read accounts still shows balance, lots and transactions, and says which scope is missing."""
    page = open_page(address(gateway.origin, "/", "demo-spacebring-readonly.public"))
    expect(page.locator(".finder").get_by_role("alert")).to_contain_text("Use a key with the scope accounts.readonly")
    page.locator(".transactions td.account a").first.click()
    expect(page.locator(".figures dd")).to_have_count(4)
    expect(page.locator(".lots tbody tr").first).to_be_visible()
    expect(page.locator("header").get_by_role("alert")).to_contain_text("SCOPE_MISSING")


def test_missing_account_and_address_are_explained(gateway: Daybook, open_page: OpenPage) -> None:
    """An unknown account gets the API's words and what to do; an unknown address leads back."""
    page = open_page(address(gateway.origin, "/accounts/nowhere"))
    expect(page.locator("header").get_by_role("alert")).to_contain_text("Check the id")
    page.goto(f"{gateway.origin}/#/nowhere/at/all")
    page.get_by_text("This address leads nowhere.").locator("..").get_by_role("link", name="All accounts").click()
    expect(page.get_by_role("heading", name="All accounts")).to_be_visible()


def test_invalid_filter_is_explained(gateway: Daybook, open_page: OpenPage) -> None:
    """A filter that the API refuses shows its words next to the filters, which can be changed."""
    page = open_page(address(gateway.origin, f"/accounts/{STUDIO}?state=LOST&from=never&through=2024-99-99"))
    alert = page.locator(".results").get_by_role("alert")
    expect(alert).to_contain_text("FILTER_INVALID")
    expect(alert).to_contain_text("Change the filters above.")
    page.locator(".filters [name=category]").fill("chat")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator(".transactions tbody tr").first).to_be_visible()


def test_rate_limit_says_when_to_try_again(gateway: Daybook, open_page: OpenPage, tmp_path: Path) -> None:
    """A 429 shows the API's words, and a button that waits as long as the API demands."""
    page = open_page(address(gateway.origin))
    settled(page)
    with crowded(gateway, tmp_path) as origin:
        page.route("**/v1/**", lambda route: route.continue_(url=route.request.url.replace(gateway.origin, origin)))
        page.get_by_role("link", name="Next").click()
        alert = page.locator(".results").get_by_role("alert")
        expect(alert).to_contain_text("RATE_LIMITED")
        expect(alert).to_contain_text("You can try again in 1 s.")
        page.unroute_all()
    alert.get_by_role("button", name=re.compile("^Try again$")).click()
    expect(page.get_by_text("Page 2", exact=True)).to_be_visible()


def test_retry_button_counts_down(gateway: Daybook, open_page: OpenPage) -> None:
    """The button of an error with a long wait is disabled, and shows the seconds that are left."""
    page = open_page(f"{gateway.origin}/")
    page.clock.install()
    page.evaluate(
        """async () => {
            const { errorPanel } = await import("/page/parts.js");
            const { ApiError } = await import("/page/api.js");
            const error = new ApiError(429, "too many calls", { retrySeconds: 30 });
            document.querySelector("main").replaceChildren(errorPanel(error, () => document.title = "tried"));
        }"""
    )
    expect(page.get_by_role("button")).to_have_text("Try again in 30 s")
    page.clock.run_for(12_000)
    expect(page.get_by_role("button")).to_have_text("Try again in 18 s")
    expect(page.get_by_role("button")).to_be_disabled()
    page.clock.run_for(18_000)
    page.get_by_role("button", name="Try again").click()
    expect(page).to_have_title("tried")


def test_absent_server_and_gateway_are_explained(gateway: Daybook, open_page: OpenPage, tmp_path: Path) -> None:
    """Without a server, and without a connection, the page says so; it works again after Try again."""
    with away(gateway, tmp_path) as origin:
        page = open_page(address(origin))
        expect(page.locator("main").get_by_role("alert")).to_contain_text("SERVICE_UNAVAILABLE")
    page = open_page(address(gateway.origin))
    settled(page)
    page.context.set_offline(True)
    page.get_by_role("link", name="Next").click()
    alert = page.locator("main").get_by_role("alert")
    expect(alert).to_contain_text("No answer")
    page.context.set_offline(False)
    alert.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("Page 2", exact=True)).to_be_visible()


def test_empty_tenant_account_and_list_say_so(gateway: Daybook, tenant: Rest, open_page: OpenPage) -> None:
    """A tenant without accounts, an account without transactions, and filters without a match have their own words."""
    page = open_page(address(gateway.origin, "/accounts/quiet-library"))
    expect(page.locator(".results")).to_contain_text("No transactions yet.")
    expect(page.locator(".figures dd").first).to_have_text("0")
    expect(page.get_by_text("No credits left in any lot.")).to_be_visible()
    page.goto(f"{gateway.origin}/#/accounts/{STUDIO}?category=nothing")
    page.get_by_role("link", name="Clear the filters").click()
    expect(page.locator(".transactions tbody tr")).to_have_count(25)
    page = open_page(address(gateway.origin, "/", key_of(tenant)))
    expect(page.locator(".finder")).to_contain_text("This key has no accounts yet.")


def test_amounts_are_exact(gateway: Daybook, tenant: Rest, open_page: OpenPage) -> None:
    """The largest and the smallest amounts, and their sums, have all digits, which floating point would round."""
    account = tenant.account(displayName="Exact")
    tenant.post(account, "GRANT", "999999999999.999999")
    for amount in ("-0.1", "-0.2", "-333333333333.333333"):
        tenant.post(account, "CHARGE", amount)
    page = open_page(address(gateway.origin, f"/accounts/{account}", key_of(tenant)))
    expect(page.locator(".figures dd").first).to_have_text("666,666,666,666.366666")
    expect(page.locator(".uses .digits")).to_have_text("333,333,333,333.633333")
    expect(page.locator(".transactions .digits").last).to_have_text("999,999,999,999.999999")


def test_long_history_is_read_step_by_step(gateway: Daybook, tenant: Rest, open_page: OpenPage) -> None:
    """Plots cover the newest 1,000 transactions and say so; earlier ones are added on demand."""
    account = tenant.account(displayName="Long")
    tenant.post(account, "GRANT", "5000")
    for first in (0, 600):
        requests = [
            {"transaction": {"kind": "CHARGE", "category": f"category_{first}", "amount": f"-{1 + n % 3}"}}
            for n in range(600)
        ]
        tenant.call("POST", f"/v1/accounts/{account}/transactions:submit", {"requests": requests})
    page = open_page(address(gateway.origin, f"/accounts/{account}", key_of(tenant)))
    expect(page.locator(".covered")).to_contain_text("The newest 1,000 transactions")
    expect(page.locator(".uses .count").nth(2)).to_have_text("400")
    page.get_by_role("button", name="Add earlier ones").click()
    expect(page.locator(".covered")).to_have_text(re.compile("^1,201 transactions"))
    expect(page.locator(".uses td.count")).to_have_text(["600", "600"])


def test_page_and_first_plot_are_fast(gateway: Daybook, open_page: OpenPage, record_property: Any) -> None:
    """The page loads and draws its first plot within seconds, also on a busy machine; the times are recorded."""
    page = open_page(address(gateway.origin, f"/accounts/{STUDIO}"))
    expect(page.locator(".plot svg")).to_be_visible()
    loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    plotted = page.evaluate("performance.getEntriesByName('plot')[0].startTime")
    record_property("page load, ms", round(loaded))
    record_property("first plot, ms", round(plotted))
    assert loaded < plotted < 10_000
