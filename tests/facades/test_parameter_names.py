"""A parameter whose name resembles a documented one is refused by name, not ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from server.demo import spacebring
from tests.support.http_client import Answer, send
from tests.support.processes import Daybook
from tests.support.vendors import APIS, Api, ask, require_sound

STATUSES = {"dreadnode": 422}
"""The status for an invalid parameter if it is not 400."""
DATES = [
    'createDate={"lte":"2024-10-22T12:00:00Z"}',
    "createDate=2024-10-22T12:00:00Z",
    "createDate[gt]=2024-10-22T12:00:00Z",
    "createDate[lt]=",
    "createDate[]=2024-10-22T12:00:00Z",
    "createDate.gte=2024-10-22T12:00:00Z",
    "createDate%2Egte=2024-10-22T12:00:00Z",
    "createDate%5bgt%5d=x",
    "createDate[GTE]=x",
    "createDate[gte]x=x",
    "createDateGte=x",
    "createDateFrom=x",
    "createDate_gt=x",
    "createDateRange[gte]=x",
    "create_date_gte=x",
    "createdate[lte]=x",
    "CREATEDATE=x",
]


def documented(api: Api) -> set[str]:
    """The documented parameters of an API: those in APIS without `createDate`, which only tests send."""
    return {name.replace("%5B", "[").replace("%5D", "]") for name in api.parameters} - {"createDate"}


def misspellings(names: set[str]) -> Iterator[str]:
    """Variants of names: other letter cases, other word separators, notations of arrays and objects."""
    for name in sorted(names):
        snake = re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name)
        camel = re.sub("_([a-z])", lambda letter: letter[1].upper(), name)
        for each in (name.upper(), name.capitalize(), snake, camel, snake.replace("_", "-"), name.lower()):
            if each not in names:
                yield each
        for tail in ("[]", "[0]", "[eq]", ".eq", "%20", "+", "-", ":"):
            yield f"{name}{tail}"


def text_of(answer: Answer) -> str:
    """The body of a refusal, as text."""
    return json.dumps(json.loads(answer.body), ensure_ascii=False)


@pytest.mark.parametrize("name", APIS)
def test_misspelled_name_is_refused(gateway: Daybook, name: str) -> None:
    """A misspelled parameter is refused in the vendor's format, with its name."""
    api = APIS[name]
    for wrong in misspellings(documented(api)):
        target = f"{api.path}?{api.good}{'&' if api.good else ''}{wrong}=1"
        answer = ask(gateway, api, target)
        require_sound(api, target, answer)
        assert answer.status == STATUSES.get(name, 400), (target, answer.body)
        assert wrong.replace("%20", " ") in text_of(answer), (target, answer.body)


@pytest.mark.parametrize("query", DATES)
def test_misspelled_date_of_spacebring_is_refused(gateway: Daybook, query: str) -> None:
    """A name that resembles Spacebring's date parameters is refused, raw and escaped."""
    api = APIS["spacebring"]
    for target in (f"{api.path}?{query}", f"{api.path}?limit=1&{query}&x=1", f"{api.path}/?{quote(query, safe='=%')}"):
        answer = ask(gateway, api, target)
        require_sound(api, target, answer)
        assert (answer.status, json.loads(answer.body)["type"]) == (400, "invalidParams"), target
        assert "createDate[gte]" in json.loads(answer.body)["message"]


@pytest.mark.parametrize("name", APIS)
def test_other_names_are_ignored(gateway: Daybook, name: str) -> None:
    """Names that resemble no parameter are ignored, and so are misspelled names without a value."""
    api = APIS[name]
    plain = ask(gateway, api, f"{api.path}?{api.good}")
    others = "utm_source=x&_=1&debug=true&fields=id&sort=x&location_id=x&X-API-Key=x&%5B%5D=1&=1"
    alone = "&".join(quote(wrong, safe="%+") for wrong in misspellings(documented(api)))
    for more in (others, alone):
        answer = ask(gateway, api, f"{api.path}?{more}&{api.good}")
        assert answer.status == plain.status == 200, answer.body


def test_credential_is_checked_before_the_query(gateway: Daybook) -> None:
    """A request without a credential gets 401, even if its query is invalid."""
    assert send(gateway.origin, f"{APIS['spacebring'].path}?createDate[gt]=x").status == 401
    headers = {"authorization": "Bearer demo-spacebring.public", "spacebring-network-id": spacebring.NETWORK}
    answer = send(gateway.origin, f"{APIS['spacebring'].path}?createDate[gt]=x", headers=headers, method="HEAD")
    assert answer.status == 400
