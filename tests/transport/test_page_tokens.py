"""Page tokens open only for the list for which they were sealed."""

from __future__ import annotations

import base64
import string
from collections.abc import Callable
from itertools import product
from random import Random
from typing import Any

import pytest
from daybook.facades.spacebring.v1.transactions_service_pb2 import GetCreditsTransactionsRequest
from daybook.facades.teable.v1.billing_service_pb2 import GetSpaceCreditHistoryRequest
from daybook.internal.v1.page_token_pb2 import PageToken
from daybook.v1.admin_service_pb2 import ListApiKeysRequest
from daybook.v1.ledger_service_pb2 import ListAccountsRequest, ListLotsRequest, ListTransactionsRequest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from server.app import SERVICES
from server.ledger.access import Caller
from server.ledger.errors import InvalidArgument, PageTokenInvalid, PageTokenMismatch
from server.ledger.paging import ApiKeyKey, TransactionKey
from server.store.credentials import TokenKey
from server.transport.page_tokens import (
    NONCE_BYTES,
    TOKEN_CHARACTERS_MAX,
    Listing,
    PageTokens,
    RowKey,
)
from server.transport.parsing import PAGE_TOKENS
from server.transport.token_keys import KEY_BYTES, TokenKeys

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT64 = st.integers(INT64_MIN, INT64_MAX) | st.sampled_from((INT64_MIN, -1, 0, 1, INT64_MAX))
ALPHABET = string.ascii_letters + string.digits + "-_"
KEY = TransactionKey(1_728_543_298_000_000, 7, 42)
CALLER = Caller(tenant_number=1, tenant_uid="uid", credential_id="key")
SEALING_KEY = bytes(range(KEY_BYTES))

# Every list with tokens: its method, its request, and its fields for the token and the page size.
LISTS: list[tuple[str, Message, str, str]] = [
    (
        "daybook.v1.Ledger/ListTransactions",
        ListTransactionsRequest(
            parent="accounts/acme-corporation", filter='category = "ai_chat"', order_by="create_time desc", page_size=3
        ),
        "page_token",
        "page_size",
    ),
    ("daybook.v1.Ledger/ListAccounts", ListAccountsRequest(page_size=3), "page_token", "page_size"),
    ("daybook.v1.Ledger/ListLots", ListLotsRequest(parent="accounts/acme", page_size=3), "page_token", "page_size"),
    ("daybook.v1.Admin/ListApiKeys", ListApiKeysRequest(page_size=3), "page_token", "page_size"),
    (
        "daybook.facades.teable.v1.Billing/GetSpaceCreditHistory",
        GetSpaceCreditHistoryRequest(
            space_id="spcAcme", month="2024-10", take="3", source_type="ai_chat", order_by="amount", order="asc"
        ),
        "cursor",
        "take",
    ),
    (
        "daybook.facades.spacebring.v1.Transactions/GetCreditsTransactions",
        GetCreditsTransactionsRequest(
            limit="3",
            create_date_gte="2024-10-01T00:00:00Z",
            create_date_lte="2024-10-31T00:00:00Z",
            location_ref="location",
            membership_ref="membership",
            company_ref="company",
        ),
        "next_page_token",
        "limit",
    ),
]

ARGUMENTS = [
    pytest.param(method, request, token_field, size_field, field, id=f"{method.rpartition('/')[2]}.{field.name}")
    for method, request, token_field, size_field in LISTS
    for field in request.DESCRIPTOR.fields
    if field.name not in (token_field, size_field)
]


def page_tokens(sealing_key: bytes = SEALING_KEY, seed: int = 1) -> PageTokens:
    """Returns page tokens with a key, and with randomness that is the same in every run."""
    return PageTokens(TokenKeys([TokenKey(sealing_key, 0)], lambda: 0), Random(seed).randbytes)


def listing_of(method: str, request: Message, token_field: str, size_field: str, caller: Caller = CALLER) -> Listing:
    """Returns the list that a request asks for."""
    return Listing.of(method, caller, request, (token_field, size_field))


LISTING = listing_of(*LISTS[0])
TOKEN = page_tokens().seal(LISTING, KEY)


def sealed_bytes(token: str) -> bytes:
    """Returns the bytes of a token, as visible without the key."""
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


def text_of(sealed: bytes) -> str:
    """Returns the text of a token, without padding."""
    return base64.urlsafe_b64encode(sealed).decode().rstrip("=")


def copy_of(request: Message) -> Any:
    """Returns a copy of a request."""
    copied = type(request)()
    copied.CopyFrom(request)
    return copied


def changed(request: Message, field: FieldDescriptor) -> Any:
    """Returns the request with another value in one field of any type."""
    copied = copy_of(request)
    if field.is_repeated:
        getattr(copied, field.name).extend(["something else"])
        return copied
    change: dict[int, Callable[[Any], object]] = {
        FieldDescriptor.CPPTYPE_STRING: lambda value: f"{value}x",
        FieldDescriptor.CPPTYPE_INT32: lambda value: value + 1,
        FieldDescriptor.CPPTYPE_INT64: lambda value: value + 1,
        FieldDescriptor.CPPTYPE_ENUM: lambda value: value + 1,
        FieldDescriptor.CPPTYPE_BOOL: lambda value: not value,
    }
    setattr(copied, field.name, change[field.cpp_type](getattr(copied, field.name)))
    return copied


def assert_invalid(token: str, tokens: PageTokens | None = None) -> None:
    """Fails unless the token is refused as damaged or forged."""
    with pytest.raises(PageTokenInvalid):
        (tokens or page_tokens()).open(LISTING, token, TransactionKey)


def test_every_request_that_takes_a_token_is_covered() -> None:
    """LISTS contains every method with a field for a token."""
    found = {
        (f"{service.full_name}/{method.name}", method.input_type.full_name, field.name)
        for service in map(descriptor_pool.Default().FindServiceByName, SERVICES)
        for method in service.methods
        for field in method.input_type.fields
        if "token" in field.name or "cursor" in field.name
    }
    assert found == {(method, request.DESCRIPTOR.full_name, token) for method, request, token, _ in LISTS}
    assert {f"{message}.{field}" for _, message, field in found} == PAGE_TOKENS, "each is bounded when it is parsed"


@given(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), st.builds(TransactionKey, INT64, INT64, INT64))
def test_transaction_key_round_trip(sealing_key: bytes, key: TransactionKey) -> None:
    """Every sealed transaction key opens unchanged, including negative and extreme 64-bit values."""
    tokens = page_tokens(sealing_key)
    assert tokens.open(LISTING, tokens.seal(LISTING, key), TransactionKey) == key


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", fullmatch=True))
def test_account_id_round_trip(account_id: str) -> None:
    """Every sealed account id opens unchanged."""
    tokens, listing = page_tokens(), listing_of(*LISTS[1])
    assert tokens.open(listing, tokens.seal(listing, account_id), str) == account_id


@given(INT64.filter(lambda number: number != 0))
def test_lot_number_round_trip(number: int) -> None:
    """Every sealed lot number opens unchanged."""
    tokens, listing = page_tokens(), listing_of(*LISTS[2])
    assert tokens.open(listing, tokens.seal(listing, number), int) == number


@given(st.builds(ApiKeyKey, INT64, st.text("abcdefghijklmnop0123456789", max_size=32)))
def test_api_key_key_round_trip(key: ApiKeyKey) -> None:
    """Every sealed position of an API key opens unchanged."""
    tokens, listing = page_tokens(), listing_of(*LISTS[3])
    assert tokens.open(listing, tokens.seal(listing, key), ApiKeyKey) == key


@pytest.mark.parametrize(
    ("number", "key", "token"),
    [
        (
            0,
            KEY,
            (
                "9bFlIkpYt5HfavHYT4mTE8x8fA0_D1nYEA3HZcRjfXWwyMTrZwEjNWRb8sSwnI8pxXD_dng_mJydkdTZIim40gM8QLQ2zkiCZF3OHsO8"
                "lN8c_2EPwHXucNP-_8SZSjyoTiNDiaI"
            ),
        ),
        (
            1,
            "acme",
            (
                "MD5hzcS7hsPRxCcQRgzgGMGO-SYmJ87EKRSVEWoI9LhjytOVxLmCuiabSicbike9gF4b-NtKtq9wzq2zRQenikxYhh4pzcr1FLbsD0W1"
                "LDn7-UoQZz69kg"
            ),
        ),
        (
            2,
            42,
            (
                "PDRMQYnrLx571dR-oZSAf2Rv2qq-LYPAfAaFGXPyrXQIp4p62M4GjUC5gwYiIRx0uG55BQapWtE1gtcKkSpGIdm1oX28EqkcZm0JYzJ4"
                "wC4"
            ),
        ),
        (
            3,
            ApiKeyKey(1_728_543_298_000_000, "db1"),
            (
                "RG_OwqPYEXNhEOV4QmfAPsw7ZFxovKWiygXBm0dcAsm7eSTjq_wbr85avhm7Ttf0n9rGj_2floh_GZjskshBs42WAIh8dYnSjnuAZHZD"
                "ilavVWMsUNeh2KsgNhpb3k-J"
            ),
        ),
    ],
)
def test_token_of_an_older_version_opens(number: int, key: RowKey, token: str) -> None:
    """A token that the first version of this module sealed still opens."""
    assert page_tokens().open(listing_of(*LISTS[number]), token, type(key)) == key


def test_token_of_another_kind_of_key_is_refused() -> None:
    """A genuine token with a key of another type is refused."""
    with pytest.raises(PageTokenInvalid):
        page_tokens().open(LISTING, page_tokens().seal(LISTING, "acme"), TransactionKey)


@pytest.mark.parametrize(
    "key", [TransactionKey(*values) for values in product((INT64_MIN, INT64_MAX), repeat=3)], ids=str
)
def test_longest_token_is_not_too_long(key: TransactionKey) -> None:
    """A token with extreme keys is URL-safe, and shorter than half of the limit."""
    token = page_tokens().seal(LISTING, key)
    assert set(token) <= set(ALPHABET)
    assert len(token) < TOKEN_CHARACTERS_MAX / 2


def test_token_of_the_longest_account_id_opens() -> None:
    """A token for an account id of 128 characters opens."""
    tokens, listing = page_tokens(), listing_of(*LISTS[1])
    assert tokens.open(listing, tokens.seal(listing, "a" * 128), str) == "a" * 128


def test_empty_token_is_the_first_page() -> None:
    """An empty token opens as None, the first page."""
    assert page_tokens().open(LISTING, "", TransactionKey) is None
    assert page_tokens().open(listing_of(*LISTS[1]), "", str) is None


def test_any_flipped_bit_is_detected() -> None:
    """A token with any single bit flipped is refused as invalid."""
    sealed = sealed_bytes(TOKEN)
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        assert_invalid(text_of(bytes(damaged)))


def test_any_changed_character_is_detected() -> None:
    """A token with any single character replaced is refused as invalid."""
    for place, character in enumerate(TOKEN):
        for other in ALPHABET.replace(character, ""):
            assert_invalid(TOKEN[:place] + other + TOKEN[place + 1 :])


@pytest.mark.parametrize("remainder", [0, 1, 2])
def test_last_character_has_one_spelling(remainder: int) -> None:
    """Only the original last character opens, even if decoding ignores some of its bits."""
    tokens, listing = page_tokens(), listing_of(*LISTS[1])
    token = next(
        token
        for length in range(1, 4)
        if len(sealed_bytes(token := tokens.seal(listing, "a" * length))) % 3 == remainder
    )
    opened = []
    for last in ALPHABET:
        try:
            opened.append((last, tokens.open(listing, token[:-1] + last, str)))
        except PageTokenInvalid:
            continue
    assert [last for last, _ in opened] == [token[-1]]


def test_any_truncation_is_detected() -> None:
    """A token without characters at its end or start is refused as invalid."""
    for length in range(1, len(TOKEN)):
        assert_invalid(TOKEN[:length])
        assert_invalid(TOKEN[length:])


@pytest.mark.parametrize(
    "token",
    [
        TOKEN + "A",
        TOKEN + "=",
        TOKEN + "==",
        TOKEN + "\n",
        " " + TOKEN,
        TOKEN + TOKEN,
        TOKEN[:10] + "\n" + TOKEN[10:],
        TOKEN[:10] + "+" + TOKEN[11:],
        TOKEN[:10] + "/" + TOKEN[11:],
        TOKEN[:10] + "é" + TOKEN[11:],
        TOKEN.swapcase(),
        "A" * TOKEN_CHARACTERS_MAX,
        "A" * (TOKEN_CHARACTERS_MAX + 1),
        "A" * 1_000_000,
        "=",
        "A",
        "AA",
        " ",
        "\0",
        "token",
        "٣" * 20,
        "A" * 16,
        "A" * 38,
    ],
    ids=range(23),
)
def test_malformed_token_is_refused(token: str) -> None:
    """A text that is not a token is refused as invalid, at any length."""
    assert_invalid(token)


@given(st.text(min_size=1))
def test_any_other_text_is_refused(text: str) -> None:
    """Any random text is refused as invalid, and raises no other error."""
    assert_invalid(text)


def test_token_of_another_key_is_invalid() -> None:
    """A token sealed with another key is refused as invalid, even if the keys differ in one bit."""
    another = bytearray(SEALING_KEY)
    another[-1] ^= 1
    assert_invalid(page_tokens(bytes(another)).seal(LISTING, KEY))


@pytest.mark.parametrize("body", [PageToken(), PageToken(v1=PageToken.V1())], ids=["no version", "an empty version"])
def test_unknown_version_is_refused(body: PageToken) -> None:
    """A genuine token of an unknown version is refused."""
    tokens = page_tokens()
    with pytest.raises(InvalidArgument):
        tokens.open(LISTING, tokens._seal(body), TransactionKey)


@pytest.mark.parametrize(("sealed_for", "opened_for"), [(a, b) for a, b in product(LISTS, LISTS) if a is not b])
def test_another_method_is_a_mismatch(
    sealed_for: tuple[str, Message, str, str], opened_for: tuple[str, Message, str, str]
) -> None:
    """A token of one list is refused as a mismatch by every other list."""
    tokens = page_tokens()
    token = tokens.seal(listing_of(*sealed_for), KEY)
    with pytest.raises(PageTokenMismatch) as refusal:
        tokens.open(listing_of(*opened_for), token, TransactionKey)
    assert refusal.value.reason == "PAGE_TOKEN_MISMATCH"


def test_same_arguments_of_another_method_are_a_mismatch() -> None:
    """A token is refused as a mismatch by another method with an equal request."""
    method, request, token_field, size_field = LISTS[0]
    with pytest.raises(PageTokenMismatch):
        page_tokens().open(listing_of(f"{method}2", request, token_field, size_field), TOKEN, TransactionKey)


def test_another_tenant_is_a_mismatch() -> None:
    """A token of one tenant is refused as a mismatch for another tenant with the same request."""
    elsewhere = Caller(tenant_number=2, tenant_uid="uid", credential_id="key")
    with pytest.raises(PageTokenMismatch):
        page_tokens().open(listing_of(*LISTS[0], caller=elsewhere), TOKEN, TransactionKey)


def test_another_credential_of_the_tenant_is_accepted() -> None:
    """A token opens for another credential of the tenant, so that keys can be rotated between pages."""
    colleague = Caller(tenant_number=1, tenant_uid="uid", credential_id="another key")
    assert page_tokens().open(listing_of(*LISTS[0], caller=colleague), TOKEN, TransactionKey) == KEY


@pytest.mark.parametrize(("method", "request_message", "token_field", "size_field", "field"), ARGUMENTS)
def test_any_other_argument_is_a_mismatch(
    method: str, request_message: Message, token_field: str, size_field: str, field: FieldDescriptor
) -> None:
    """A token is refused as a mismatch if any argument is changed, added or removed."""
    tokens = page_tokens()
    other = changed(request_message, field)
    without = copy_of(request_message)
    without.ClearField(field.name)
    for sealed_for, opened_for in (
        (request_message, other),
        (other, request_message),
        (without, other),
        (other, without),
    ):
        token = tokens.seal(listing_of(method, sealed_for, token_field, size_field), KEY)
        with pytest.raises(PageTokenMismatch):
            tokens.open(listing_of(method, opened_for, token_field, size_field), token, TransactionKey)


@pytest.mark.parametrize(
    ("method", "request_message", "token_field", "size_field"), LISTS, ids=[each[0] for each in LISTS]
)
def test_size_of_a_page_may_change(method: str, request_message: Message, token_field: str, size_field: str) -> None:
    """A token opens with another page size, without one, and if the request contains the token."""
    tokens = page_tokens()
    token = tokens.seal(listing_of(method, request_message, token_field, size_field), KEY)
    for size in (1, 1000, None):
        request = copy_of(request_message)
        request.ClearField(size_field)
        if size is not None:
            is_text = isinstance(getattr(request, size_field), str)
            setattr(request, size_field, str(size) if is_text else size)
        setattr(request, token_field, token)
        assert tokens.open(listing_of(method, request, token_field, size_field), token, TransactionKey) == KEY


@pytest.mark.parametrize(
    ("method", "request_message", "token_field", "size_field", "shown"),
    [(*each, shown) for each, shown in zip(LISTS, (*["page_token"] * 4, "cursor", "nextPageToken"), strict=True)],
)
def test_refusal_names_the_public_field(
    method: str, request_message: Message, token_field: str, size_field: str, shown: str
) -> None:
    """The error names the token's field as in the native contract or the vendor's JSON."""
    with pytest.raises(PageTokenInvalid) as refusal:
        page_tokens().open(listing_of(method, request_message, token_field, size_field), "damaged", TransactionKey)
    assert refusal.value.field == shown


def test_listing_does_not_change_the_request() -> None:
    """Creating a listing keeps the token and the page size in the request."""
    request = ListTransactionsRequest(parent="accounts/acme", page_size=3, page_token="token")
    listing_of("daybook.v1.Ledger/ListTransactions", request, "page_token", "page_size")
    assert request == ListTransactionsRequest(parent="accounts/acme", page_size=3, page_token="token")


def test_token_reveals_nothing() -> None:
    """A token does not contain the account, the filter, the method or any part of the body in clear."""
    listing = listing_of(*LISTS[1])
    tokens = page_tokens()
    for token, account in ((TOKEN, b"acme"), (tokens.seal(listing, "acme-corporation"), b"acme")):
        sealed = sealed_bytes(token)
        for secret in (account, b"ai_chat", b"category", b"Ledger", b"List", b"daybook", b"create_time", b"accounts"):
            assert secret not in sealed
            assert secret not in token.encode()
        assert LISTING.arguments_hash not in sealed
        assert listing.arguments_hash not in sealed


def test_every_token_has_its_own_nonce() -> None:
    """Two tokens of one row have different nonces and bodies, and both open."""
    tokens = page_tokens()
    first = tokens.seal(LISTING, KEY)
    second = tokens.seal(LISTING, KEY)
    assert sealed_bytes(first)[:NONCE_BYTES] != sealed_bytes(second)[:NONCE_BYTES]
    assert sealed_bytes(first)[NONCE_BYTES:] != sealed_bytes(second)[NONCE_BYTES:]
    assert tokens.open(LISTING, first, TransactionKey) == tokens.open(LISTING, second, TransactionKey) == KEY
