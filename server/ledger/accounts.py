"""Accounts as they are stored, and their conversion to API messages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from daybook.v1.account_pb2 import Account

from server.ledger import money
from server.ledger.instants import Instant, to_timestamp
from server.ledger.money import Millionths
from server.ledger.names import account_name
from server.ledger.posting import AccountState


@dataclass(frozen=True, slots=True)
class AccountRecord:
    """A row of the table of accounts."""

    id: str
    kind: Account.Kind.ValueType
    display_name: str
    credit_limit: Millionths
    profile: bytes
    """A serialized Account that has only the profile: its user or company."""
    hour_anchor: Instant = 0
    """The time from which the account's hour windows are counted."""
    create_time: Instant = 0
    update_time: Instant = 0
    number: int = 0
    """The primary key; 0 until the database assigns one."""

    @property
    def etag(self) -> str:
        """A hash of the fields that a caller can set."""
        content = repr((self.display_name, self.credit_limit, self.profile)).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def to_message(self) -> Account:
        """The account as an API message."""
        message = Account.FromString(self.profile)
        message.name = account_name(self.id)
        message.number = self.number
        message.kind = self.kind
        message.display_name = self.display_name
        message.credit_limit = money.write(self.credit_limit)
        message.hour_anchor_time.CopyFrom(to_timestamp(self.hour_anchor))
        message.create_time.CopyFrom(to_timestamp(self.create_time))
        message.update_time.CopyFrom(to_timestamp(self.update_time))
        message.etag = self.etag
        return message


class AccountWithState(NamedTuple):
    """An account, and its state at one time."""

    account: AccountRecord
    state: AccountState
    """Has no lots, and does not count expired credits."""
