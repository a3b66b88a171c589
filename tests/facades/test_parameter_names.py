"""A parameter that reads like a documented one and isn't is refused by name, and not dropped in silence."""

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
"""What a wrong parameter gets; 400 elsewhere."""
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
    """The names of a page's parameters. APIS has `createDate` too, to be tried."""
    return {name.replace("%5B", "[").replace("%5D", "]") for name in api.parameters} - {"createDate"}


def misspellings(names: set[str]) -> Iterator[str]:
    """What programs and people make of names: another case, other words' joints, a way to write arrays and objects."""
    for name in sorted(names):
        snake = re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name)
        camel = re.sub("_([a-z])", lambda letter: letter[1].upper(), name)
        for each in (name.upper(), name.capitalize(), snake, camel, snake.replace("_", "-"), name.lower()):
            if each not in names:
                yield each
        for tail in ("[]", "[0]", "[eq]", ".eq", "%20", "+", "-", ":"):
            yield f"{name}{tail}"


def named_in(answer: Answer) -> str:
    """A refusal, as one text."""
    return json.dumps(json.loads(answer.body), ensure_ascii=False)


@pytest.mark.parametrize("name", APIS)
def test_misspelled_name_is_refused(gateway: Daybook, name: str) -> None:
    """Of each documented parameter every usual misspelling gets a 400 of the vendor's that names it."""
    api = APIS[name]
    for wrong in misspellings(documented(api)):
        target = f"{api.path}?{api.good}{'&' if api.good else ''}{wrong}=1"
        answer = ask(gateway, api, target)
        require_sound(api, target, answer)
        assert answer.status == STATUSES.get(name, 400), (target, answer.body)
        assert wrong.replace("%20", " ") in named_in(answer), (target, answer.body)


@pytest.mark.parametrize("query", DATES)
def test_dates_of_spacebring(gateway: Daybook, query: str) -> None:
    """Every name that begins like the documented two, raw and escaped."""
    api = APIS["spacebring"]
    for target in (f"{api.path}?{query}", f"{api.path}?limit=1&{query}&x=1", f"{api.path}/?{quote(query, safe='=%')}"):
        answer = ask(gateway, api, target)
        require_sound(api, target, answer)
        assert (answer.status, json.loads(answer.body)["type"]) == (400, "invalidParams"), target
        assert "createDate[gte]" in json.loads(answer.body)["message"]


@pytest.mark.parametrize("name", APIS)
def test_other_names_are_ignored(gateway: Daybook, name: str) -> None:
    """What no page has, and nobody could take for a parameter of this one, changes nothing; nor does a name alone."""
    api = APIS[name]
    plain = ask(gateway, api, f"{api.path}?{api.good}")
    others = "utm_source=x&_=1&debug=true&fields=id&sort=x&location_id=x&X-API-Key=x&%5B%5D=1&=1"
    alone = "&".join(quote(wrong, safe="%+") for wrong in misspellings(documented(api)))
    for more in (others, alone):
        answer = ask(gateway, api, f"{api.path}?{more}&{api.good}")
        assert answer.status == plain.status == 200, answer.body


def test_credential_comes_first(gateway: Daybook) -> None:
    """Without a credential nothing is said about the query."""
    assert send(gateway.origin, f"{APIS['spacebring'].path}?createDate[gt]=x").status == 401
    headers = {"authorization": "Bearer demo-spacebring.public", "spacebring-network-id": spacebring.NETWORK}
    answer = send(gateway.origin, f"{APIS['spacebring'].path}?createDate[gt]=x", headers=headers, method="HEAD")
    assert answer.status == 400
