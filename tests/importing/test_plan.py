"""The plan brings just enough credits forward."""

from __future__ import annotations

from decimal import Decimal

from hypothesis import example, given
from hypothesis import strategies as st

from server.importing.plan import Pool

AMOUNTS = st.decimals(min_value=-1000, max_value=1000, places=2)
POSITIVE = st.decimals(min_value=0, max_value=1000, places=2)


@example(held=Decimal(0), amounts=[Decimal(-5), Decimal(10)], shown=Decimal(5), credit_limit=Decimal(0))
@given(held=POSITIVE, amounts=st.lists(AMOUNTS), shown=st.none() | POSITIVE, credit_limit=POSITIVE)
def test_balance_is_that_of_the_source(
    held: Decimal, amounts: list[Decimal], shown: Decimal | None, credit_limit: Decimal
) -> None:
    """No row finds too few credits, and the balance at the end is the one that is shown."""
    pool = Pool(held, shown=shown)
    for amount in amounts:
        pool.add(amount)
    opening, correction = pool.settle(credit_limit)
    assert opening >= 0 >= correction
    balance = held + opening
    for amount in amounts:
        balance += amount
        assert balance >= -credit_limit
    if shown is None:
        # Without a shown balance nothing is taken, and nothing is brought forward without need.
        assert correction == 0
        assert opening == 0 or held + opening + pool.lowest == -credit_limit
    else:
        assert balance + correction == shown
