"""Creates an account, grants and charges credits, and prints the history: `python charge.py ACCOUNT_ID`."""

from __future__ import annotations

import os
import sys

from daybook_client import AccountKind, Daybook, NewTransaction, TransactionKind

account_id = sys.argv[1]
address = os.environ.get("DAYBOOK_ADDRESS", "127.0.0.1:50051")
key = os.environ.get("DAYBOOK_KEY", "demo-dreadnode.public")

with Daybook(address, key=key) as daybook:
    account = daybook.create_account(account_id, AccountKind.USER, request_id=f"{account_id}-1").name
    grant = NewTransaction(TransactionKind.GRANT, "purchase", 20)
    daybook.create_transaction(account, grant, request_id=f"{account_id}-2")
    charge = NewTransaction(TransactionKind.CHARGE, "inference", "-0.25")
    daybook.create_transaction(account, charge, request_id=f"{account_id}-3")
    for each in daybook.list_transactions(account):
        print(each.kind, each.amount, each.balance_after)
