"""API keys over the wire: creation, listing, revocation, rotation, use and expiry."""

from __future__ import annotations

from collections.abc import Awaitable

import grpc
import pytest
import structlog
from daybook.v1.account_pb2 import Account
from daybook.v1.admin_service_pb2 import (
    CreateApiKeyRequest,
    CreateApiKeyResponse,
    ListApiKeysRequest,
    ListApiKeysResponse,
    RevokeApiKeyRequest,
    RotateApiKeyRequest,
    RotateApiKeyResponse,
)
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import GetAccountRequest, ListAccountsRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from server.book import Book
from server.ledger.access import Caller
from server.ledger.errors import ScopeMissing
from server.ledger.instants import SECOND, from_timestamp, to_timestamp
from server.usecases.api_keys import ApiKeyDraft
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.markers import only_sqlite
from tests.support.refusals import read_refusal, refusal_of
from tests.support.waiting import until

DAY = 24 * 3600
INVALID = ("UNAUTHENTICATED", "CREDENTIAL_INVALID")


async def create(admin: Client, **fields: object) -> CreateApiKeyResponse:
    """Creates a key, which may read transactions unless `fields` say otherwise."""
    api_key = ApiKey(**{"scopes": ["transactions.readonly"], **fields})  # type: ignore[arg-type]
    return await admin.admin.CreateApiKey(CreateApiKeyRequest(api_key=api_key), metadata=admin.metadata)


async def list_keys(admin: Client, page_size: int = 0, page_token: str = "") -> ListApiKeysResponse:
    """A page of keys."""
    request = ListApiKeysRequest(page_size=page_size, page_token=page_token)
    return await admin.admin.ListApiKeys(request, metadata=admin.metadata)


async def listed(admin: Client, name: str) -> ApiKey:
    """One key from the list."""
    (found,) = [each for each in (await list_keys(admin)).api_keys if each.name == name]
    return found


async def revoke(admin: Client, name: str) -> ApiKey:
    """Revokes a key."""
    return await admin.admin.RevokeApiKey(RevokeApiKeyRequest(name=name), metadata=admin.metadata)


async def rotate(admin: Client, name: str, grace_seconds: int = 0) -> RotateApiKeyResponse:
    """Gives a key a new secret."""
    request = RotateApiKeyRequest(name=name, grace_period=Duration(seconds=grace_seconds))
    return await admin.admin.RotateApiKey(request, metadata=admin.metadata)


def holder(admin: Client, key_string: str) -> Client:
    """The caller who holds a key."""
    return Client(admin.channel, key_string)


def get_acme(caller: Client) -> Awaitable[Account]:
    """A call that reads an account."""
    return caller.ledger.GetAccount(GetAccountRequest(name="accounts/acme"), metadata=caller.metadata)


async def test_key_is_created(client: Client, admin: Client) -> None:
    """A new key has the requested fields, grants only its scopes, and appears in the list."""
    await client.create_account("acme")
    created = await create(
        admin,
        scopes=["accounts.readonly", "transactions", "accounts.readonly"],
        display_name="Reports, é",
        account="accounts/acme",
    )
    key_id, _, secret = created.key_string.partition(".")
    assert created.api_key == ApiKey(
        name=f"apiKeys/{key_id}",
        display_name="Reports, é",
        scopes=["transactions", "accounts.readonly"],
        account="accounts/acme",
        create_time=to_timestamp(NOON),
    )
    assert len(secret) == 43
    assert await listed(admin, created.api_key.name) == created.api_key
    caller = holder(admin, created.key_string)
    assert (await get_acme(caller)).name == "accounts/acme"
    await caller.post("acme", Transaction.GRANT, "1")
    for call, reason in (
        (caller.create_account("acme"), "SCOPE_MISSING"),
        (caller.post("other", Transaction.GRANT, "1"), "ACCOUNT_NOT_PERMITTED"),
        (create(caller), "SCOPE_MISSING"),
        (caller.ledger.ListAccounts(ListAccountsRequest(), metadata=caller.metadata), "ACCOUNT_NOT_PERMITTED"),
    ):
        assert (await refusal_of(call)).verdict == ("PERMISSION_DENIED", reason)


@only_sqlite
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"scopes": []}, "api_key.scopes"),
        ({"scopes": ["transactions", "everything"]}, "api_key.scopes"),
        ({"scopes": ["Transactions"]}, "api_key.scopes"),
        ({"scopes": ["transactions accounts"]}, "api_key.scopes"),
        ({"display_name": "x" * 256}, "api_key.display_name"),
        ({"display_name": "\0"}, "api_key.display_name"),
        ({"account": "acme"}, "api_key.account"),
        ({"account": "accounts/-"}, "api_key.account"),
        ({"expire_time": to_timestamp(NOON)}, "api_key.expire_time"),
        ({"expire_time": to_timestamp(NOON - 1)}, "api_key.expire_time"),
        ({"expire_time": Timestamp(nanos=-1)}, "api_key.expire_time"),
        ({"ttl": Duration(nanos=999_999_999)}, "api_key.ttl"),
        ({"ttl": Duration(seconds=-1)}, "api_key.ttl"),
        ({"ttl": Duration(seconds=1, nanos=-1)}, "api_key.ttl"),
        ({"ttl": Duration(seconds=36_525 * DAY, nanos=1000)}, "api_key.ttl"),
    ],
)
async def test_invalid_field_of_a_key_is_refused(admin: Client, fields: dict[str, object], field: str) -> None:
    """A key with an invalid field is refused with the field's name, and not created."""
    before = await list_keys(admin)
    refusal = await refusal_of(create(admin, **fields))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)
    assert await list_keys(admin) == before


@only_sqlite
@pytest.mark.parametrize(
    "name", ["", "apiKeys/", "apiKeys/A", "apiKeys/a/b", "apiKeys/-", "keys/a", "a.b", f"{'a' * 65}"]
)
async def test_invalid_name_of_a_key_is_refused(admin: Client, name: str) -> None:
    """A name that no key can have is refused."""
    for call in (revoke(admin, name), rotate(admin, name)):
        refusal = await refusal_of(call)
        assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "name")


@only_sqlite
@pytest.mark.parametrize(
    "grace_period", [Duration(seconds=-1), Duration(seconds=30 * DAY, nanos=1000), Duration(nanos=1_000_000_000)]
)
async def test_invalid_grace_period_is_refused(admin: Client, grace_period: Duration) -> None:
    """A grace period below 0 or above 30 days is refused, and the key keeps its secret."""
    created = await create(admin)
    request = RotateApiKeyRequest(name=created.api_key.name, grace_period=grace_period)
    refusal = await refusal_of(admin.admin.RotateApiKey(request, metadata=admin.metadata))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "grace_period")
    assert (await refusal_of(get_acme(holder(admin, created.key_string)))).reason == "SCOPE_MISSING", "still valid"


async def test_key_for_an_unknown_account_is_refused(server: Server, admin: Client) -> None:
    """A key can't be bound to an account that its tenant lacks, even if another tenant has it."""
    other = await server.client(await server.create_tenant("other"))
    await other.create_account("theirs")
    before = await list_keys(admin)
    for account in ("accounts/nothing", "accounts/theirs"):
        refusal = await refusal_of(create(admin, account=account))
        assert (refusal.verdict, refusal.metadata) == (("NOT_FOUND", "ACCOUNT_NOT_FOUND"), {"account": account})
    assert await list_keys(admin) == before


async def test_key_expires(client: Client, admin: Client, clock: Clock) -> None:
    """A key is valid until the microsecond before its expire_time, even if it is cached."""
    await client.create_account("acme")
    by_time = await create(admin, scopes=["accounts"], expire_time=to_timestamp(NOON + 60 * SECOND))
    by_ttl = await create(admin, scopes=["accounts"], ttl=Duration(seconds=59, nanos=999_999_999))
    assert from_timestamp(by_time.api_key.expire_time) == NOON + 60 * SECOND
    assert from_timestamp(by_ttl.api_key.expire_time) == NOON + 60 * SECOND - 1
    for seconds, validity in (
        (0, (True, True)),
        (59.999998, (True, True)),
        (59.999999, (True, False)),
        (60, (False, False)),
    ):
        clock.now = NOON
        clock.advance(seconds)
        for created, is_valid in zip((by_time, by_ttl), validity, strict=True):
            call = get_acme(holder(admin, created.key_string))
            if is_valid:
                assert (await call).name == "accounts/acme"
            else:
                assert (await refusal_of(call)).verdict == INVALID, seconds
    assert (await listed(admin, by_time.api_key.name)).expire_time == by_time.api_key.expire_time
    refusal = await refusal_of(rotate(admin, by_time.api_key.name))
    assert refusal.verdict == ("FAILED_PRECONDITION", "API_KEY_INACTIVE")
    assert refusal.metadata == {"api_key": by_time.api_key.name}


async def test_pages_of_keys(server: Server, admin: Client, clock: Clock) -> None:
    """All pages together have each of the tenant's keys once, newest first, even with equal times or new keys."""
    neighbour = await server.client(await server.create_tenant("neighbour"), scopes={"admin"})
    created = [each.name for each in (await list_keys(admin)).api_keys]
    clock.advance(1)
    for seconds in (0, 0, 0, 1, 1):
        clock.advance(seconds)
        created.append((await create(admin)).api_key.name)
        await create(neighbour)
    await revoke(admin, created[-1])
    whole = await list_keys(admin)
    assert whole.next_page_token == ""
    names = [each.name for each in whole.api_keys]
    assert sorted(names) == sorted(created)
    times = [from_timestamp(each.create_time) for each in whole.api_keys]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 4, "one for the admin and the client, one for three keys, and two for single keys"
    read: list[ApiKey] = []
    token = ""
    while True:
        page = await list_keys(admin, page_size=2, page_token=token)
        read += page.api_keys
        assert len(page.api_keys) <= 2
        clock.advance(1)
        await create(admin, display_name="came in between")
        token = page.next_page_token
        if not token:
            break
    assert [each.name for each in read] == names
    first = await list_keys(admin, page_size=1)
    for call, verdict in (
        (list_keys(neighbour, page_token=first.next_page_token), "PAGE_TOKEN_MISMATCH"),
        (list_keys(admin, page_token="x"), "PAGE_TOKEN_INVALID"),
        (list_keys(admin, page_size=-1), "FIELD_INVALID"),
        (
            admin.ledger.ListAccounts(ListAccountsRequest(page_token=first.next_page_token), metadata=admin.metadata),
            "PAGE_TOKEN_MISMATCH",
        ),
    ):
        assert (await refusal_of(call)).verdict == ("INVALID_ARGUMENT", verdict)


async def test_revoked_key_is_refused(admin: Client, clock: Clock) -> None:
    """A revoked key that isn't cached is refused at once; revoking it again changes nothing."""
    created = await create(admin, scopes=["accounts"])
    clock.advance(5)
    revoked = await revoke(admin, created.api_key.name)
    assert from_timestamp(revoked.revoke_time) == clock.now
    assert (await refusal_of(get_acme(holder(admin, created.key_string)))).verdict == INVALID
    clock.advance(5)
    assert await revoke(admin, created.api_key.name) == revoked == await listed(admin, created.api_key.name)
    refusal = await refusal_of(rotate(admin, created.api_key.name))
    assert refusal.verdict == ("FAILED_PRECONDITION", "API_KEY_INACTIVE")


async def test_key_of_another_tenant_is_not_found(server: Server, admin: Client) -> None:
    """Another tenant's key is NOT_FOUND like an unknown one, and stays valid."""
    stranger = await server.client(await server.create_tenant("stranger"), scopes={"admin"})
    theirs = await create(stranger, scopes=["accounts"])
    for name in (theirs.api_key.name, "apiKeys/nothing"):
        for call in (revoke(admin, name), rotate(admin, name)):
            refusal = await refusal_of(call)
            assert refusal.verdict == ("NOT_FOUND", "API_KEY_NOT_FOUND")
            assert refusal.metadata == {"api_key": name}
    assert theirs.api_key.name not in {each.name for each in (await list_keys(admin)).api_keys}
    await holder(admin, theirs.key_string).create_account("acme")


@only_sqlite
async def test_bound_credential_manages_no_keys(server: Server, client: Client, admin: Client) -> None:
    """A credential bound to an account can't manage keys, whatever its scopes."""
    await client.create_account("acme")
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    bound = await server.client(tenant_number, account_id="acme", scopes={"admin"})
    created = await create(admin)
    for call in (
        create(bound, account="accounts/acme"),
        list_keys(bound),
        revoke(bound, created.api_key.name),
        rotate(bound, created.api_key.name),
    ):
        assert (await refusal_of(call)).verdict == ("PERMISSION_DENIED", "ACCOUNT_NOT_PERMITTED")


async def test_caller_grants_only_its_own_scopes(book: Book) -> None:
    """A caller creates and rotates only keys whose scopes its own scopes include."""
    tenant_number = await book.credentials.create_tenant(slug="house", uid="u", display_name="n", create_time=NOON)
    narrow = Caller(tenant_number, "u", "narrow", scopes=frozenset({"transactions"}))
    wide = Caller(tenant_number, "u", "wide", scopes=frozenset({"admin"}))
    own, _ = await book.api_keys.create(narrow, ApiKeyDraft(("transactions", "transactions.readonly")))
    await book.api_keys.rotate(narrow, own.id, 0)
    other, text = await book.api_keys.create(wide, ApiKeyDraft(("transactions", "accounts.readonly")))
    for scope in ("accounts.readonly", "accounts", "admin"):
        with pytest.raises(ScopeMissing) as refusal:
            await book.api_keys.create(narrow, ApiKeyDraft(("transactions", scope)))
        assert refusal.value.metadata == {"scope": scope}
    with pytest.raises(ScopeMissing):
        await book.api_keys.rotate(narrow, other.id, 0)
    assert (await book.credentials.api_key(other.id)) == other
    assert [each.id for each in (await book.api_keys.list(wide, None, 10)).rows].count(other.id) == 1
    assert text.startswith(f"{other.id}.")


async def test_rotated_key_has_a_new_secret(client: Client, admin: Client) -> None:
    """A rotated key keeps all but its secret: the new secret is valid at once, and the old one no longer."""
    await client.create_account("acme")
    created = await create(
        admin, scopes=["accounts"], display_name="d", account="accounts/acme", ttl=Duration(seconds=DAY)
    )
    rotated = await rotate(admin, created.api_key.name)
    assert rotated.api_key == created.api_key == await listed(admin, created.api_key.name)
    assert rotated.key_string.partition(".")[0] == created.key_string.partition(".")[0]
    assert rotated.key_string != created.key_string
    assert (await get_acme(holder(admin, rotated.key_string))).name == "accounts/acme"
    assert (await refusal_of(get_acme(holder(admin, created.key_string)))).verdict == INVALID


async def is_accepted(admin: Client, key_string: str) -> bool:
    """Whether a key is a valid credential."""
    try:
        await get_acme(holder(admin, key_string))
    except grpc.aio.AioRpcError as error:
        if read_refusal(error).verdict != INVALID:
            raise
        return False
    return True


async def test_old_secret_is_valid_during_its_grace_period(client: Client, admin: Client, clock: Clock) -> None:
    """The old secret is valid until its grace period ends, also after a further rotation."""
    await client.create_account("acme")
    created = await create(admin, scopes=["accounts"])
    name = created.api_key.name
    secrets = [created.key_string, (await rotate(admin, name, 60)).key_string]
    clock.advance(10)
    secrets.append((await rotate(admin, name, 60)).key_string)
    for seconds, expected in ((59.999999, [True, True, True]), (60, [False, True, True]), (70, [False, False, True])):
        clock.now = NOON
        clock.advance(seconds)
        assert [await is_accepted(admin, each) for each in secrets] == expected, seconds
    assert not await is_accepted(admin, f"{secrets[0].partition('.')[0]}.x")


async def test_rotation_without_a_grace_period_ends_all_others(client: Client, admin: Client) -> None:
    """After a rotation without a grace period only the newest secret is valid."""
    await client.create_account("acme")
    name = (created := await create(admin, scopes=["accounts"])).api_key.name
    older = [created.key_string, (await rotate(admin, name, DAY)).key_string]
    newest = (await rotate(admin, name)).key_string
    assert [await is_accepted(admin, each) for each in (*older, newest)] == [False, False, True]


async def test_shorter_grace_period_shortens_earlier_ones(client: Client, admin: Client, clock: Clock) -> None:
    """No secret outlives the grace period of a later rotation."""
    await client.create_account("acme")
    name = (created := await create(admin, scopes=["accounts"])).api_key.name
    older = [created.key_string, (await rotate(admin, name, DAY)).key_string]
    newest = (await rotate(admin, name, 60)).key_string
    clock.advance(60)
    assert [await is_accepted(admin, each) for each in (*older, newest)] == [False, False, True]


async def test_key_has_at_most_five_secrets(client: Client, admin: Client, clock: Clock) -> None:
    """A key has at most five secrets: its newest, and the four whose grace periods end last."""
    await client.create_account("acme")
    name = (created := await create(admin, scopes=["accounts"])).api_key.name
    secrets = [created.key_string]
    for _ in range(6):
        clock.advance(1)
        secrets.append((await rotate(admin, name, DAY)).key_string)
    assert [await is_accepted(admin, each) for each in secrets] == [False, False, True, True, True, True, True]


async def test_grace_period_ends_with_the_key(client: Client, admin: Client, clock: Clock) -> None:
    """A secret in its grace period ends when its key expires or is revoked."""
    await client.create_account("acme")
    for end in ("expiry", "revocation"):
        created = await create(admin, scopes=["accounts"], ttl=Duration(seconds=60))
        rotated = await rotate(admin, created.api_key.name, DAY)
        if end == "expiry":
            assert await is_accepted(admin, created.key_string)
            clock.advance(60)
        else:
            await revoke(admin, created.api_key.name)
        assert [await is_accepted(admin, each) for each in (created.key_string, rotated.key_string)] == [
            False,
            False,
        ], end


async def test_last_use_is_listed(book: Book, client: Client, admin: Client, clock: Clock) -> None:
    """The list has the time of a key's last authenticated call, even a refused one; an unused key has no time."""
    await client.create_account("acme")
    used, refused, unused = [await create(admin, scopes=[scope]) for scope in ("accounts", "transactions", "accounts")]
    clock.advance(7)
    await get_acme(holder(admin, used.key_string))
    clock.advance(1)
    await refusal_of(get_acme(holder(admin, refused.key_string)))
    await refusal_of(get_acme(holder(admin, f"{unused.key_string}x")))
    await book.api_key_uses.flush()
    times = [(await listed(admin, created.api_key.name)).last_use_time for created in (used, refused, unused)]
    assert [from_timestamp(time) for time in times[:2]] == [NOON + 7 * SECOND, NOON + 8 * SECOND]
    assert not (await listed(admin, unused.api_key.name)).HasField("last_use_time")


@only_sqlite
async def test_secret_appears_only_once(client: Client, admin: Client, capfd: pytest.CaptureFixture[str]) -> None:
    """Only the answer that creates a secret holds it; no other answer, log line or output does."""
    await client.create_account("acme")
    with structlog.testing.capture_logs() as logs:
        created = await create(admin, scopes=["accounts"])
        rotated = await rotate(admin, created.api_key.name, DAY)
        answers = [
            await list_keys(admin),
            await listed(admin, created.api_key.name),
            await get_acme(holder(admin, created.key_string)),
            await get_acme(holder(admin, rotated.key_string)),
            await refusal_of(create(holder(admin, rotated.key_string))),
            await refusal_of(get_acme(holder(admin, f"{created.key_string}x"))),
            rotated.api_key,
            await revoke(admin, created.api_key.name),
            await refusal_of(rotate(admin, created.api_key.name)),
        ]
        # A call is logged after its answer is sent.
        await until(lambda: [line.get("method") for line in logs].count("daybook.v1.Admin/RotateApiKey") == 2)
    captured = capfd.readouterr()
    output = f"{answers} {logs} {captured.out} {captured.err}"
    for key_string in (created.key_string, rotated.key_string):
        assert key_string.partition(".")[2] not in output
    assert created.key_string.partition(".")[0] in output
