"""Resource names: valid ids, the parsing of names, and the making of uids."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from uuid import RFC_4122, UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.ledger.errors import FieldInvalid
from server.ledger.names import (
    account_name,
    balance_name,
    in_blocks,
    is_account_id,
    parse_account_name,
    parse_balance_name,
    parse_transaction_name,
    transaction_name,
    uid_text,
    uuid7,
)

UID = "0192f3a4-5b6c-7d8e-9f01-23456789abcd"

ACCOUNT_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("a", True),
        ("7", True),
        ("Acme", True),
        ("acme_1.2-3", True),
        ("a..b", True),
        ("a-", True),
        (UID, True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("", False),
        ("-", False),
        ("-a", False),
        ("_a", False),
        (".a", False),
        ("..", False),
        ("a b", False),
        ("a/b", False),
        ("a:b", False),
        ("a%2Fb", False),
        ("a@b", False),
        (" a", False),
        ("a ", False),
        ("a\n", False),
        ("a\0", False),
        ("ä", False),
        ("aé", False),
        ("٣", False),
        ("a٣", False),
        ("\u212a", False),  # The Kelvin sign, which lower-cases to an ASCII k.
    ],
)
def test_account_ids_are_validated(text: str, valid: bool) -> None:
    """An account id is 1 to 128 ASCII letters, digits, `_`, `.` and `-`, the first a letter or a digit."""
    assert is_account_id(text) is valid


@pytest.mark.parametrize(
    ("name", "account_id"),
    [
        ("accounts/acme", "acme"),
        ("accounts/7", "7"),
        ("accounts/A_b.c-d", "A_b.c-d"),
        (f"accounts/{'a' * 128}", "a" * 128),
    ],
)
def test_an_account_name_is_parsed(name: str, account_id: str) -> None:
    """The id of `accounts/{account}` is parsed, whether or not the wildcard is allowed."""
    assert parse_account_name("parent", name) == account_id
    assert parse_account_name("parent", name, wildcard=True) == account_id


NO_ACCOUNT_NAMES = [
    "",
    "acme",
    "accounts",
    "accounts/",
    "accounts//",
    "accounts/acme/",
    "/accounts/acme",
    "accounts/acme/transactions",
    "accounts//acme",
    "Accounts/acme",
    "account/acme",
    "accounts/_acme",
    "accounts/a b",
    "accounts/--",
    f"accounts/{'a' * 129}",
    " accounts/acme",
    "accounts/acme\n",
]


def prefix_of_refusal(name: str) -> str:
    """The beginning of the refusal of a name, before its form."""
    return "" if name else "is required, and "


@pytest.mark.parametrize("wildcard", [False, True])
@pytest.mark.parametrize("name", NO_ACCOUNT_NAMES)
def test_other_account_names_are_refused(name: str, wildcard: bool) -> None:
    """A name of another form is refused, and the error names the field."""
    with pytest.raises(FieldInvalid) as refusal:
        parse_account_name("parent", name, wildcard=wildcard)
    assert refusal.value.field == "parent"
    assert refusal.value.problem == f"{prefix_of_refusal(name)}must have the form accounts/{{account}}"


def test_the_wildcard_must_be_allowed() -> None:
    """`accounts/-` is parsed if the wildcard is allowed, and refused otherwise."""
    assert parse_account_name("parent", "accounts/-", wildcard=True) == "-"
    with pytest.raises(FieldInvalid):
        parse_account_name("parent", "accounts/-")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "accounts/acme",
        "accounts/acme/",
        "accounts/acme/balances",
        "accounts/acme/balance/",
        "accounts/-/balance",
        "accounts//balance",
        "balance",
        "accounts/acme/transactions",
        "accounts/a b/balance",
    ],
)
def test_other_balance_names_are_refused(name: str) -> None:
    """A name without the form `accounts/{account}/balance` is refused, and so is the wildcard."""
    with pytest.raises(FieldInvalid) as refusal:
        parse_balance_name("name", name)
    assert refusal.value.field == "name"
    assert refusal.value.problem == f"{prefix_of_refusal(name)}must have the form accounts/{{account}}/balance"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "accounts/acme",
        "accounts/acme/transactions",
        "accounts/acme/transactions/",
        f"accounts/acme/transactions/{UID}/",
        f"accounts/-/transactions/{UID}",
        f"accounts//transactions/{UID}",
        f"accounts/acme/transaction/{UID}",
        f"accounts/acme/transactions/{UID.upper()}",
        f"accounts/acme/transactions/{UID.replace('-', '')}",
        f"accounts/acme/transactions/{{{UID}}}",
        f"accounts/acme/transactions/urn:uuid:{UID}",
        f"accounts/acme/transactions/{UID[:-1]}",
        f"accounts/acme/transactions/{UID}0",
        f"accounts/acme/transactions/{UID}\n",
        f"accounts/acme/transactions/{UID[:-1]}g",
        f"accounts/acme/transactions/{UID[:-1]}٣",
    ],
)
def test_other_transaction_names_are_refused(name: str) -> None:
    """A name without the form `accounts/{account}/transactions/{canonical uuid}` is refused."""
    with pytest.raises(FieldInvalid) as refusal:
        parse_transaction_name("name", name)
    assert refusal.value.field == "name"
    form = "accounts/{account}/transactions/{transaction}"
    assert refusal.value.problem == f"{prefix_of_refusal(name)}must have the form {form}"


@given(ACCOUNT_IDS, st.uuids())
def test_formatted_names_are_parsed_back(account_id: str, uid: UUID) -> None:
    """Every formatted name is parsed into its parts."""
    assert parse_account_name("name", account_name(account_id)) == account_id
    assert parse_balance_name("name", balance_name(account_id)) == account_id
    assert parse_transaction_name("name", transaction_name(account_id, uid)) == (account_id, uid)


def test_names_have_the_documented_forms() -> None:
    """Names have the forms of the contract."""
    assert account_name("acme") == "accounts/acme"
    assert balance_name("acme") == "accounts/acme/balance"
    assert transaction_name("acme", UUID(UID)) == f"accounts/acme/transactions/{UID}"


def constant(value: bytes) -> Callable[[int], bytes]:
    """Fixed randomness; fails if another number of bytes is requested."""

    def random_bytes(count: int) -> bytes:
        assert count == len(value)
        return value

    return random_bytes


@pytest.mark.parametrize(
    ("instant", "random", "uid"),
    [
        # Computed by hand from RFC 9562, 5.7: 48 bits of milliseconds, 0111, 12 bits, 10, 62 bits.
        (0, "00000000000000000000", "00000000-0000-7000-8000-000000000000"),
        (0, "ffffffffffffffffffff", "00000000-0000-7fff-bfff-ffffffffffff"),
        # The example of RFC 9562, A.6: 0x017F22E279B0 ms, rand_a 0xCC3, rand_b 0x18C4DC0C0C07398F.
        # rand_a and rand_b together are the lower 74 of the 80 random bits.
        (0x017F22E279B0 * 1000, "0330d8c4dc0c0c07398f", "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"),
        (0x017F22E279B0 * 1000 + 999, "0330d8c4dc0c0c07398f", "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"),
        ((2**48 - 1) * 1000, "00000000000000000001", "ffffffff-ffff-7000-8000-000000000001"),
    ],
)
def test_uids_have_the_layout_of_rfc_9562(instant: int, random: str, uid: str) -> None:
    """A uid has the layout of RFC 9562, 5.7, and depends only on time and randomness."""
    assert uid_text(uuid7(instant, constant(bytes.fromhex(random)))) == uid


@given(st.integers(0, 2**48 * 1000 - 1), st.binary(min_size=10, max_size=10))
def test_uids_have_version_7_and_their_time(instant: int, random: bytes) -> None:
    """A uid has version 7 and the RFC's variant, and its first 48 bits are the milliseconds."""
    uid = UUID(bytes=uuid7(instant, constant(random)))
    assert uid.version == 7
    assert uid.variant == RFC_4122
    assert uid.int >> 80 == instant // 1000


@given(
    st.integers(0, 2**48 * 1000 - 1001),
    st.integers(1000, 10**15),
    st.binary(min_size=10, max_size=10),
    st.binary(min_size=10, max_size=10),
)
def test_uids_sort_by_time(instant: int, later_by: int, first: bytes, second: bytes) -> None:
    """A uid of a later millisecond sorts after an earlier one, as bytes and as text, for any randomness."""
    later = min(instant + later_by, 2**48 * 1000 - 1)
    earlier_uid, later_uid = uuid7(instant, constant(first)), uuid7(later, constant(second))
    assert earlier_uid < later_uid
    assert uid_text(earlier_uid) < uid_text(later_uid)


@given(st.binary(min_size=10, max_size=10), st.integers(0, 73))
def test_every_random_bit_counts(random: bytes, bit: int) -> None:
    """Flipping any of the lower 74 random bits changes the uid."""
    flipped = (int.from_bytes(random, "big") ^ 1 << bit).to_bytes(10, "big")
    assert uuid7(0, constant(random)) != uuid7(0, constant(flipped))


def test_randomness_is_read_in_blocks() -> None:
    """Randomness is read in blocks, and each byte is used at most once and in order."""
    requested: list[int] = []
    source = Random(1)

    def draw(count: int) -> bytes:
        requested.append(count)
        return source.randbytes(count)

    take = in_blocks(draw)
    taken = [take(count) for count in (10, 10, 0, 980, 1, 3000, 5)]
    assert [len(part) for part in taken] == [10, 10, 0, 980, 1, 3000, 5]
    assert requested == [1000, 1000, 3000, 1000]
    given = Random(1)
    first, second, third, fourth = (given.randbytes(count) for count in requested)
    # Each part comes from one block; a rest that is too short is dropped.
    assert b"".join(taken[:4]) == first
    assert taken[4:] == [second[:1], third, fourth[:5]]
