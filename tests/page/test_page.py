"""The page in a real browser, in front of the demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support import curl
from tests.support.pages import KEY, OpenPage, address, key_of
from tests.support.processes import Daybook, environment
from tests.support.rest import JsonObject, Rest

STUDIO = "studio-north"
HOSTILE = "<img src=x onerror=\"window.hacked='name'\">"
MINUS = "\u2212"


@pytest.fixture(scope="module")
def studio(gateway: Daybook) -> Rest:
    """A caller with the key of the demo's teams."""
    return Rest(gateway.origin, KEY)


def listed(rest: Rest, account: str = STUDIO, **parameters: object) -> list[dict[str, Any]]:
    """All transactions that the API lists."""
    body: Any = rest.call("GET", f"/v1/accounts/{account}/transactions?{urlencode({'pageSize': 1000, **parameters})}")
    assert not body["nextPageToken"]
    found: list[dict[str, Any]] = body["transactions"]
    return found


def shown(text: str) -> str:
    """An amount as the page shows it."""
    whole, point, fraction = text.removeprefix("-").partition(".")
    return f"{MINUS if text.startswith('-') else ''}{int(whole):,}{point}{fraction}"


def rows(page: Page) -> list[list[str]]:
    """The texts of the list's cells, without padding: time, kind, category, description, amount, balance."""
    # Waits until the list is the one that the address asks for.
    expect(page.locator(".results[aria-busy]")).to_have_count(0)
    expect(page.locator(".transactions tbody tr").first).to_be_visible()
    cells: list[list[str]] = page.eval_on_selector_all(
        ".transactions tbody tr",
        "rows => rows.map(row => [...row.cells].map(cell => (cell.querySelector('.digits') ?? cell).innerText.trim()))",
    )
    return cells


def expected_rows(transactions: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The time, category and signed amount of each row that the list must show."""
    return [
        (
            each["createTime"][:19].replace("T", " "),
            each["category"],
            ("" if each["amount"].startswith("-") else "+") + shown(each["amount"]),
        )
        for each in transactions
    ]


def brief(cells: list[list[str]]) -> list[tuple[str, str, str]]:
    """The time, category and amount of each row of an account's list."""
    return [(row[0], row[2], row[4]) for row in cells]


def apply(page: Page, **fields: str) -> None:
    """Fills in the filters, and applies them."""
    for name, value in fields.items():
        field = page.locator(f".filters [name={name}]")
        if field.evaluate("field => field.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
    page.get_by_role("button", name="Apply").click()


def test_printed_address_opens_the_demo(gateway: Daybook, open_page: OpenPage) -> None:
    """`daybook up --demo` prints an address that shows data at once. The tab keeps the key, the address doesn't."""
    (printed,) = re.findall(r"^http\S+#key=\S+$", gateway.stdout, re.MULTILINE)
    page = open_page(printed)
    expect(page.get_by_role("heading", name="All accounts")).to_be_visible()
    assert len(rows(page)) == 25
    assert page.url == f"{gateway.origin}/#/"
    page.reload()
    assert len(rows(page)) == 25
    another = open_page(page.url)
    expect(another.get_by_label("API key")).to_be_focused()


def test_pasted_key_opens_the_page_until_it_is_forgotten(gateway: Daybook, open_page: OpenPage) -> None:
    """A pasted key opens the view that the address names; Forget key removes it from the tab."""
    page = open_page(f"{gateway.origin}/#/accounts/{STUDIO}")
    page.get_by_label("API key").fill("two words")
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_role("alert")).to_contain_text("without spaces")
    page.get_by_label("API key").fill(f" {KEY} ")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Studio North")).to_be_visible()
    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("sessionStorage.length + localStorage.length") == 0
    assert page.context.cookies() == []


def test_new_user_follows_a_charge_to_its_lots(gateway: Daybook, open_page: OpenPage, tmp_path: Path) -> None:
    """From the printed address to an account, a charge, its lots and its refund; the copied command gets the same."""
    page = open_page(address(gateway.origin))
    page.get_by_label("Find an account").fill("NÓRTH")
    expect(page.locator(".accounts a")).to_have_count(1)
    page.locator(".accounts a").click()
    expect(page.get_by_role("heading", name="Studio North")).to_be_focused()
    page.get_by_role("link", name="video_render").click()
    expect(page.get_by_role("heading", name="Transactions")).to_be_focused()
    assert {row[2] for row in rows(page)} == {"video_render"}
    page.locator(".transactions tbody a", has_text="2024-10-09").click()
    expect(page.get_by_role("heading", name=f"Charge {MINUS}62.5")).to_be_focused()

    lots = page.locator(".allocations tbody tr")
    expect(lots).to_have_count(1)
    expect(lots).to_contain_text("Grant: October plan")
    expect(lots).to_contain_text("2024-11-01 07:00:00")
    lots.get_by_role("link", name="Lot 3").click()
    expect(page.locator(".lots tr.marked")).to_contain_text("Grant: October plan")
    page.go_back()
    page.get_by_role("region", name="Refunds").get_by_role("link").click()
    expect(page.get_by_role("heading", name="Refund +20.5")).to_be_visible()
    page.get_by_role("link", name="the charge").click()
    expect(page.get_by_text("Refunded 20.5 of 62.5 credits")).to_be_visible()

    page.get_by_role("button", name="Copy: Transaction").click()
    expect(page.get_by_role("button", name="Copy: Transaction")).to_have_text("Copied")
    command = page.evaluate("navigator.clipboard.readText()")
    assert KEY not in command
    curl.install(tmp_path)
    result = subprocess.run(
        ["sh", "-c", command],
        env=environment(PATH=f"{os.environ['PATH']}{os.pathsep}{tmp_path}", DAYBOOK_KEY=KEY),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(result.stdout)["name"] == page.url.partition("#/")[2]


def test_transfer_leads_to_its_other_side(gateway: Daybook, open_page: OpenPage) -> None:
    """A transfer links to the transaction of the other account."""
    page = open_page(address(gateway.origin, "/accounts/old-mill-school?kind=TRANSFER_IN"))
    page.locator(".transactions tbody a").click()
    page.get_by_role("link", name="the transfer out").click()
    expect(page.get_by_role("heading", name=f"Transfer out {MINUS}60")).to_be_visible()
    expect(page.get_by_role("navigation", name="Path")).to_contain_text("Studio North")


def test_balance_and_lots_are_those_of_the_api(gateway: Daybook, studio: Rest, open_page: OpenPage) -> None:
    """The view of an account has its balance to the last digit, and its open lots in the order of spending."""
    balance: Any = studio.call("GET", f"/v1/accounts/{STUDIO}/balance")
    lots: Any = studio.call("GET", f"/v1/accounts/{STUDIO}/lots")["lots"]
    page = open_page(address(gateway.origin, f"/accounts/{STUDIO}"))
    figures = page.locator(".figures dd")
    expect(figures).to_have_text(
        [shown(balance[each]) for each in ("amount", "availableAmount", "expiringAmount", "permanentAmount")]
    )
    still_open = [each for each in lots if each["remainingAmount"] != "0"]
    assert len(still_open) == 3
    still_open.sort(key=lambda each: (each["priority"], each.get("expireTime", "9"), int(each["sequence"])))
    expect(page.locator(".lots tbody th")).to_have_text([each["name"].split("/")[3] for each in still_open])
    page.get_by_role("link", name="Show spent and expired lots too (3)").click()
    expect(page.locator(".lots tbody th")).to_have_text([str(number + 1) for number in range(6)])
    expect(page.locator(".lots tbody tr").first).to_contain_text("2024-10-01 07:00:00")


def test_plots_show_balance_and_use(gateway: Daybook, studio: Rest, open_page: OpenPage) -> None:
    """The plot of the balance has a table with the last balance of each day; use by category has exact sums."""
    history = listed(studio)
    page = open_page(address(gateway.origin, f"/accounts/{STUDIO}"))
    plot = page.get_by_role("img", name=re.compile("Balance from 2024-09-01 to 2024-12-02"))
    expect(plot).to_be_visible()
    assert f"at last {history[0]['balanceAfter']}," in (plot.get_attribute("aria-label") or "")
    page.get_by_text("Balance as a table").click()
    days: dict[str, str] = {}
    for each in history:
        days.setdefault(each["createTime"][:10], shown(each["balanceAfter"]))
    cells = page.locator("details tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(c => c.innerText))"
    )
    assert [tuple(row) for row in cells] == list(days.items())

    charges = [each for each in history if (each["kind"], each["state"]) == ("CHARGE", "SUCCEEDED")]
    sums: dict[str, int] = {}
    for each in charges:
        whole, _, fraction = each["amount"].removeprefix("-").partition(".")
        sums[each["category"]] = sums.get(each["category"], 0) + int(whole + fraction.ljust(6, "0"))
    found = page.locator(".uses tbody tr").evaluate_all(
        "rows => rows.map(row => [row.querySelector('a').innerText, row.querySelector('.digits').innerText])"
    )
    assert len(found) == 5
    assert {name: round(float(text.replace(",", "")) * 1_000_000) for name, text in found} == sums


@pytest.mark.parametrize(
    ("fields", "filters", "order"),
    [
        ({"kind": "GRANT"}, "kind = GRANT", ""),
        ({"category": "speech"}, 'category = "speech"', ""),
        ({"state": "FAILED"}, "state = FAILED", ""),
        (
            {"from": "2024-10-05", "through": "2024-10-06", "order": "create_time"},
            'create_time >= "2024-10-05T00:00:00Z" AND create_time < "2024-10-07T00:00:00Z"',
            "create_time",
        ),
        ({"kind": "CHARGE", "category": "video_render", "order": "amount"}, 'category = "video_render"', "amount"),
        ({"order": "amount desc"}, "", "amount desc"),
    ],
    ids=str,
)
def test_filters_and_order_are_those_of_the_api(
    gateway: Daybook, studio: Rest, open_page: OpenPage, fields: dict[str, str], filters: str, order: str
) -> None:
    """The list has the rows that the API lists for the filter and the order, also after a reload."""
    if "kind" in fields and "category" in fields:
        filters = f"kind = CHARGE AND {filters}"
    expected = expected_rows(listed(studio, filter=filters, orderBy=order))[:25]
    page = open_page(address(gateway.origin, f"/accounts/{STUDIO}"))
    expect(page.locator(".uses tbody tr").first).to_be_visible()
    apply(page, **fields)
    page.wait_for_url(lambda url: "?" in url)
    assert brief(rows(page)) == expected
    page.reload()
    assert brief(rows(page)) == expected
    page.get_by_role("link", name="Clear").click()
    expect(page.locator(".filters [name=kind]")).to_have_value("")
    assert len(rows(page)) == 25


def test_pages_follow_each_other(gateway: Daybook, studio: Rest, open_page: OpenPage) -> None:
    """Pages have all rows in order. Back, Previous, a reload, and the address in another tab show the same page."""
    expected = expected_rows(listed(studio, filter="kind = CHARGE"))
    assert len(expected) > 75
    page = open_page(address(gateway.origin, f"/accounts/{STUDIO}?kind=CHARGE"))
    for number in range(3):
        expect(page.get_by_text(f"Page {number + 1}", exact=True)).to_be_visible()
        assert brief(rows(page)) == expected[25 * number : 25 * number + 25]
        page.get_by_role("link", name="Next").click()
    expect(page.get_by_text("Page 4", exact=True)).to_be_visible()
    page.go_back()
    expect(page.get_by_text("Page 3", exact=True)).to_be_visible()
    page.get_by_role("link", name="Previous").click()
    expect(page.get_by_text("Page 2", exact=True)).to_be_visible()
    page.reload()
    assert brief(rows(page)) == expected[25:50]
    another = open_page(address(gateway.origin, page.url.partition("#")[2]))
    expect(another.get_by_text("Page 2", exact=True)).to_be_visible()
    assert brief(rows(another)) == expected[25:50]
    another.get_by_role("link", name="First").click()
    expect(another.get_by_text("Page 1", exact=True)).to_be_visible()


def test_newest_transactions_of_all_accounts_are_listed(gateway: Daybook, studio: Rest, open_page: OpenPage) -> None:
    """For a key of the whole tenant the first view lists all accounts, with their names."""
    newest = listed(studio, "-")[:25]
    page = open_page(address(gateway.origin))
    cells = rows(page)
    assert [(row[0], row[3], row[5]) for row in cells] == expected_rows(newest)
    names = {STUDIO: "Studio North", "harbour-clinic": "Harbour Clinic", "old-mill-school": "Old Mill School"}
    assert [row[1] for row in cells] == [names[each["name"].split("/")[1]] for each in newest]
    page.locator(".transactions td.account a", has_text="Harbour Clinic").first.click()
    expect(page.get_by_role("heading", name="Harbour Clinic")).to_be_visible()


@pytest.mark.parametrize(
    ("route", "target"),
    [
        ("/", "/v1/accounts/-/transactions:export?format=CSV"),
        (f"/accounts/{STUDIO}?category=chat&order=amount", ""),
    ],
)
def test_downloaded_csv_equals_the_export(
    gateway: Daybook, studio: Rest, open_page: OpenPage, route: str, target: str
) -> None:
    """The file has the bytes of the export with the list's filter and order."""
    page = open_page(address(gateway.origin, route))
    rows(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    query = urlencode({"format": "CSV", "filter": 'category = "chat"', "orderBy": "amount"})
    answer = studio.send("GET", target or f"/v1/accounts/{STUDIO}/transactions:export?{query}")
    assert answer.status == 200
    assert Path(download.value.path()).read_bytes() == answer.body
    assert download.value.suggested_filename.endswith(".csv")


@pytest.fixture(scope="module")
def hostile(tenant: Rest) -> tuple[str, JsonObject]:
    """An account with a transaction, whose texts are markup, scripts and a script's URI."""
    account = tenant.account(displayName=HOSTILE)
    tenant.post(account, "GRANT", "5")
    transaction = tenant.post(
        account,
        "CHARGE",
        "-1",
        description="</td></table><script>window.hacked='description'</script>\u202e",
        labels={"location": '"><svg onload=window.hacked=1> \\" OR'},
        receiptUri="javascript:window.hacked='receipt'",
        metadata={"<b>": "</pre><script>window.hacked='metadata'</script>"},
        creator={"id": "x", "name": HOSTILE},
    )
    return account, transaction


def test_texts_never_become_markup(
    gateway: Daybook, tenant: Rest, hostile: tuple[str, JsonObject], open_page: OpenPage
) -> None:
    """Markup in names, descriptions, labels and metadata is shown as text, and a script's URI is no link."""
    account, transaction = hostile
    page = open_page(address(gateway.origin, "/", key_of(tenant)))
    apply(page, label="location", value='"><svg onload=window.hacked=1> \\" OR')
    page.wait_for_url(lambda url: "label=" in url)
    (row,) = rows(page)
    assert row[1] == HOSTILE
    assert row[4] == str(transaction["description"])
    page.locator(".transactions td.account a").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
    page.locator(".transactions td.time a").first.click()
    expect(page.locator("dl.facts")).to_contain_text("javascript:window.hacked='receipt'")
    expect(page.locator("dl.facts pre")).to_contain_text("</pre><script>")
    assert page.evaluate("window.hacked") is None
    assert page.locator("[onerror], [onload], main img, main script, main svg:not([aria-hidden])").count() == 0
    assert page.locator("a[href^=javascript]").count() == 0
    page.goto(f"{gateway.origin}/#/accounts/{account}%22%3E%3Cimg%20src%3Dx%20onerror%3Dwindow.hacked%3D1%3E")
    expect(page.get_by_role("alert").first).to_be_visible()
    assert page.evaluate("window.hacked") is None


def test_injected_script_does_not_run(gateway: Daybook, browser: Browser) -> None:
    """The policy of the page blocks inline scripts, handlers and styles, and requests to other origins."""
    page = browser.new_page()
    page.goto(f"{gateway.origin}/")
    page.evaluate(
        """async () => {
            window.blocked = [];
            addEventListener("securitypolicyviolation", (event) => window.blocked.push(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.hacked = 'script'";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=\\"window.hacked='handler'\\">");
            document.body.insertAdjacentHTML("beforeend", "<p style='color: red'>styled</p>");
            await fetch("http://127.0.0.1:1/").catch(() => null);
        }"""
    )
    page.wait_for_function("window.blocked.length >= 4")
    assert page.evaluate("window.hacked") is None
    assert set(page.evaluate("window.blocked")) >= {
        "script-src-elem",
        "script-src-attr",
        "style-src-attr",
        "connect-src",
    }
    page.close()
