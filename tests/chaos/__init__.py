"""A campaign against real processes: they are killed under load, and afterwards the books must be right.

`python -m tests.chaos` (`make chaos`) runs scenarios. In each, 64 callers post over gRPC while one process is
killed, or one disk is filled, again and again. A caller repeats a call that got no answer with the same request_id,
as a client does. At the end the ledger must hold each acknowledged transaction once, one effect per request_id,
nothing else but expirations, and `VerifyAccounts` must report no finding.
"""
