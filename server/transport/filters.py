"""The filter and order_by of ListTransactions.

The filter is the part of AIP-160 that an index can serve: comparisons of known fields,
joined by AND; OR only between values of one field, where it binds tighter than AND.
"""

from __future__ import annotations

from collections.abc import Callable

from daybook.v1.transaction_pb2 import Transaction
from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedInput, UnexpectedToken

from server.caching import ByteLRU
from server.ledger import instants
from server.ledger.errors import FieldInvalid, FilterInvalid
from server.ledger.paging import EVERYTHING, Order, OrderField, TransactionFilter

FILTER_CHARACTERS_MAX = 2048
VALUES_MAX = 16
FIELDS = ("kind", "category", "state", "create_time", "labels.location", "labels.membership", "labels.company")
"""The fields that a list can be filtered by."""
_SPELLINGS = {"createTime": "create_time"}
"""The JSON names of fields that differ from the field's name."""
FILTERS_BYTES_MAX = 1024 * 1024
"""Maximum size of the cache of parsed filters, in bytes: more than 1,000 typical filters."""

_GRAMMAR = r"""
    start: (_factor ("AND" _factor)*)?
    _factor: "(" _factor ")" | alternatives
    alternatives: comparison ("OR" comparison)*
    comparison: FIELD OPERATOR value
    value: STRING -> text
         | WORD -> word

    FIELD: /[a-z][A-Za-z_]*(\.[a-z_]+)?(?=\s*[=<>!])/
    OPERATOR: ">=" | "<=" | "!=" | "=" | ">" | "<"
    STRING: /"(\\.|[^"\\])*"/
    WORD: /(?!(AND|OR)\b)[A-Za-z0-9_.:+-]+/
    %ignore /\s+/
"""


class _Comparison:
    def __init__(self, field: str, operator: str, value: str) -> None:
        self.field, self.operator, self.value = field, operator, value


class _Build(Transformer[Token, list[list[_Comparison]]]):
    """Turns a parsed filter into alternatives (OR) of comparisons, all of which hold (AND)."""

    def start(self, factors: list[list[_Comparison]]) -> list[list[_Comparison]]:
        return factors

    def alternatives(self, comparisons: list[_Comparison]) -> list[_Comparison]:
        return comparisons

    def comparison(self, parts: list[str]) -> _Comparison:
        field, operator, value = map(str, parts)
        return _Comparison(_SPELLINGS.get(field, field), operator, value)

    def text(self, tokens: list[Token]) -> str:
        return str(tokens[0])[1:-1].replace('\\"', '"').replace("\\\\", "\\")

    def word(self, tokens: list[Token]) -> str:
        return str(tokens[0])


_parser = Lark(_GRAMMAR, parser="lalr")


# An entry holds the text, and its values once more.
_parsed: ByteLRU[str, TransactionFilter] = ByteLRU(FILTERS_BYTES_MAX, lambda text, _: 8 * len(text))


def parse_filter(text: str) -> TransactionFilter:
    """Parses a filter. Raises FilterInvalid with the position of a syntax error, or with the unsupported part.

    server/transport/parsing.py refuses texts of more than FILTER_CHARACTERS_MAX.
    """
    if not text:
        return EVERYTHING
    parsed = _parsed.get(text)
    if parsed is None:
        parsed = _parse(text)
        _parsed.put(text, parsed)
    return parsed


def _parse(text: str) -> TransactionFilter:
    if "\0" in text:
        # No stored text contains NUL, and PostgreSQL refuses to compare with it.
        raise FilterInvalid("filter", "must not contain the character NUL")
    try:
        factors = _Build().transform(_parser.parse(text))
    except UnexpectedInput as error:
        is_at_end = isinstance(error, UnexpectedToken) and error.token.type == "$END"
        place = "at its end" if is_at_end else f"at character {(error.pos_in_stream or 0) + 1}"
        raise FilterInvalid("filter", f"has a syntax error {place}") from None
    found: dict[str, object] = {}
    for factor in factors:
        for name, value in _read(factor).items():
            if name in found:
                raise FilterInvalid("filter", f"{factor[0].field} is given more than once")
            found[name] = value
    return TransactionFilter(**found)  # type: ignore[arg-type]  # _read gives each field its type


def _read(alternatives: list[_Comparison]) -> dict[str, object]:
    field = alternatives[0].field
    if any(other.field != field for other in alternatives):
        raise FilterInvalid("filter", "OR is only possible between values of one field")
    if len(alternatives) > VALUES_MAX:
        raise FilterInvalid("filter", f"{field} has more than {VALUES_MAX} values")
    if field not in FIELDS:
        raise FilterInvalid("filter", f"{field} can't be filtered by; use {', '.join(FIELDS)}")
    if field == "create_time":
        return _read_bound(alternatives)
    if any(other.operator != "=" for other in alternatives):
        raise FilterInvalid("filter", f"{field} can only be compared with =")
    values = tuple(dict.fromkeys(other.value for other in alternatives))
    match field:
        case "kind":
            return {"kinds": tuple(_enum_value("Kind", field, value) for value in values)}
        case "state":
            return {"states": tuple(_enum_value("State", field, value) for value in values)}
        case "category":
            return {"categories": values}
    if len(values) > 1:
        raise FilterInvalid("filter", f"{field} takes one value")
    return {field.removeprefix("labels."): values[0]}


def _enum_value(enum: str, field: str, name: str) -> int:
    # Value 0 means unspecified; no transaction has it.
    numbers = {value.name: value.number for value in Transaction.DESCRIPTOR.enum_types_by_name[enum].values[1:]}
    if name not in numbers:
        raise FilterInvalid("filter", f"{field} must be one of {', '.join(numbers)}")
    return numbers[name]


_BOUNDS: dict[str, Callable[[int], dict[str, object]]] = {
    ">=": lambda instant: {"create_time_from": instant},
    ">": lambda instant: {"create_time_from": instant + 1},
    "<": lambda instant: {"create_time_before": instant},
    "<=": lambda instant: {"create_time_before": instant + 1},
}


def _read_bound(alternatives: list[_Comparison]) -> dict[str, object]:
    comparison = alternatives[0]
    if len(alternatives) > 1 or comparison.operator not in _BOUNDS:
        raise FilterInvalid("filter", "create_time takes >=, >, <= and <, without OR")
    try:
        return _BOUNDS[comparison.operator](instants.parse(comparison.value))
    except ValueError as error:
        raise FilterInvalid("filter", f"create_time {error}") from None


def parse_order_by(text: str) -> Order:
    """Parses an order_by. Raises FieldInvalid."""
    match [_SPELLINGS.get(word, word) for word in text.split()]:
        case []:
            return Order()
        case [name] | [name, "asc"] if name in _ORDER_FIELDS:
            return Order(OrderField(name), descending=False)
        case [name, "desc"] if name in _ORDER_FIELDS:
            return Order(OrderField(name), descending=True)
    raise FieldInvalid("order_by", 'must be create_time or amount, alone or followed by " asc" or " desc"')


_ORDER_FIELDS = {field.value for field in OrderField}
