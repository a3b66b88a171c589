"""Deterministic simulation of servers that share a database: `make simulate SEEDS=1000 START=0`.

One seed decides everything in a simulation: the order of an event loop with virtual time (loop.py), how
many servers run, when they die, what each operation on the database suffers (faults.py), and what clients do.

- A server (process.py) is the object graph of a real one below gRPC: servicers, use cases, poster, sweeper, API-key
  cache and page tokens. All servers share one SQLite database in memory (disk.py).
- Clients write (writes.py), read (reads.py) and use API keys (keys.py). They repeat each call of unknown outcome
  until they have an answer (client.py), as the documentation of idempotency asks them to.
- A model of plain dicts reads every commit right after it happens, and checks it and every answer against what
  clients asked for (model.py) and against the expected books of the account (books.py).
- simulation.py puts these together. planted.py has faults that prove that the simulation finds faults.

A seed that fails prints its schedule and the command that repeats it exactly.
"""
