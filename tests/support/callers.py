"""Callers of the native API: asynchronous, of a server in the test's process; and blocking, of the gateway."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import grpc
from daybook.v1.account_pb2 import Account, Balance
from daybook.v1.admin_service_pb2 import VerifyAccountsRequest, VerifyAccountsResponse
from daybook.v1.admin_service_pb2_grpc import AdminStub
from daybook.v1.ledger_service_pb2 import (
    TRANSACTION_VIEW_FULL,
    CreateAccountRequest,
    CreateTransactionRequest,
    GetBalanceRequest,
    GetTransactionRequest,
    ListLotsRequest,
    ListTransactionsRequest,
    TransferCreditsRequest,
    TransferCreditsResponse,
)
from daybook.v1.ledger_service_pb2_grpc import LedgerStub
from daybook.v1.transaction_pb2 import Lot, Transaction

from server.book import Book
from server.ledger.access import DEFAULT_SCOPES, new_api_key

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Channel options for a channel with its own connection."""


@dataclass
class Client:
    """A caller of the native API, with its own key."""

    channel: grpc.aio.Channel
    key: str
    ledger: LedgerStub = field(init=False)
    admin: AdminStub = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = LedgerStub(self.channel)
        self.admin = AdminStub(self.channel)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata with the caller's credential."""
        return credential(self.key)

    async def create_account(self, account_id: str, **fields: object) -> Account:
        """Creates an account, by default of kind SPACE."""
        account = Account(**{"kind": Account.SPACE, **fields})  # type: ignore[arg-type]
        return await self.ledger.CreateAccount(
            CreateAccountRequest(account_id=account_id, account=account), metadata=self.metadata
        )

    async def post(
        self, account_id: str, kind: Transaction.Kind.ValueType, amount: str, *, request_id: str = "", **fields: object
    ) -> Transaction:
        """Posts a transaction, by default of category `test`."""
        transaction = Transaction(**{"kind": kind, "amount": amount, "category": "test", **fields})  # type: ignore[arg-type]
        return await self.ledger.CreateTransaction(
            CreateTransactionRequest(parent=f"accounts/{account_id}", transaction=transaction, request_id=request_id),
            metadata=self.metadata,
        )

    async def transfer(
        self, source: str, destination: str, amount: str, *, request_id: str = ""
    ) -> TransferCreditsResponse:
        """Moves credits between two accounts."""
        request = TransferCreditsRequest(
            name=f"accounts/{source}", destination=f"accounts/{destination}", amount=amount, request_id=request_id
        )
        return await self.ledger.TransferCredits(request, metadata=self.metadata)

    async def raw_call(self, method: str, request: bytes) -> bytes:
        """Calls a method of Ledger. Returns the serialized response."""
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(f"/daybook.v1.Ledger/{method}")
        return await call(request, metadata=self.metadata)

    async def balance(self, account_id: str = "acme") -> Balance:
        """Returns the balance of an account."""
        return await self.ledger.GetBalance(
            GetBalanceRequest(name=f"accounts/{account_id}/balance"), metadata=self.metadata
        )

    async def full(self, name: str) -> Transaction:
        """Returns a transaction in full view."""
        return await self.ledger.GetTransaction(
            GetTransactionRequest(name=name, view=TRANSACTION_VIEW_FULL), metadata=self.metadata
        )

    async def history(self, account_id: str = "acme") -> list[Transaction]:
        """Returns all transactions of an account, or of the tenant for `-`, oldest first."""
        request = ListTransactionsRequest(parent=f"accounts/{account_id}", order_by="create_time", page_size=1000)
        rows: list[Transaction] = []
        while not rows or request.page_token:
            page = await self.ledger.ListTransactions(request, metadata=self.metadata)
            rows += page.transactions
            request.page_token = page.next_page_token
            if not page.transactions:
                break
        return rows

    async def lots(self, account_id: str = "acme") -> list[Lot]:
        """Returns the first 1,000 lots of an account."""
        request = ListLotsRequest(parent=f"accounts/{account_id}", page_size=1000)
        return list((await self.ledger.ListLots(request, metadata=self.metadata)).lots)

    async def verify(self, account: str = "") -> list[VerifyAccountsResponse.Finding]:
        """Returns the findings of VerifyAccounts. The caller needs the scope `admin`."""
        call = self.admin.VerifyAccounts(VerifyAccountsRequest(account=account), metadata=self.metadata)
        events = [event async for event in call]
        findings = [event.finding for event in events if event.HasField("finding")]
        assert events[-1].progress.done, "done is set in the last message"
        assert not any(event.progress.done for event in events[:-1])
        assert events[-1].progress.finding_count == len(findings)
        return findings


class Server:
    """A ledger served over a real socket."""

    def __init__(self, book: Book, channel: grpc.aio.Channel) -> None:
        self.book = book
        self.channel = channel

    async def create_tenant(self, slug: str) -> int:
        """Creates a tenant; returns its number."""
        return await self.book.credentials.create_tenant(
            slug=slug,
            uid=str(uuid.uuid5(uuid.NAMESPACE_URL, slug)),
            display_name=slug,
            create_time=self.book.clock(),
        )

    async def client(
        self, tenant_number: int, *, account_id: str | None = None, scopes: Collection[str] = DEFAULT_SCOPES
    ) -> Client:
        """Returns a caller with a new key, which is bound to the account if one is given."""
        key = new_api_key(self.book.random_bytes)
        account_number = None
        if account_id is not None:
            account_number = await self.book.account_store.number(tenant_number, account_id)
        await self.book.credentials.create_api_key(
            key_id=key.key_id,
            secret_hash=key.secret_hash,
            tenant_number=tenant_number,
            account_number=account_number,
            create_time=self.book.clock(),
            scopes=scopes,
        )
        return Client(self.channel, key.text)


def ledger_stub(channel: grpc.Channel) -> Any:
    """Returns a blocking stub of Ledger. The generated stubs have types for asyncio only."""
    return LedgerStub(channel)  # type: ignore[arg-type]


class NativeCaller:
    """Writes to the demo over gRPC through the gateway, in accounts that only one test uses."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.ledger = ledger_stub(channel)

    def create_account(self, key: str, kind: Account.Kind.ValueType = Account.OTHER, **fields: object) -> str:
        """Creates an account with a new id in the tenant of the key; returns the id."""
        account_id = f"test-{uuid.uuid4()}"
        account = Account(kind=kind, **fields)  # type: ignore[arg-type]
        self.ledger.CreateAccount(
            CreateAccountRequest(account_id=account_id, account=account), metadata=credential(key)
        )
        return account_id

    def post(
        self, key: str, account_id: str, kind: Transaction.Kind.ValueType, category: str, amount: str, **fields: object
    ) -> Transaction:
        """Posts a transaction."""
        transaction = Transaction(kind=kind, category=category, amount=amount, **fields)  # type: ignore[arg-type]
        posted: Transaction = self.ledger.CreateTransaction(
            CreateTransactionRequest(parent=f"accounts/{account_id}", transaction=transaction),
            metadata=credential(key),
        )
        return posted


def credential(key: str) -> tuple[tuple[str, str], ...]:
    """Returns the metadata of a call with a key."""
    return (("authorization", f"Bearer {key}"),)
