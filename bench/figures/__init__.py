"""The figures, by their numbers in bench/README.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.figures import depth, importing, latency, memory, overload, reading, rest, starting, workers, writing
from bench.report import Finding
from bench.stage import Stage


@dataclass(frozen=True, slots=True)
class Figure:
    """A measurement with its title in bench/README.md."""

    title: str
    measure: Callable[[Stage], list[Finding]]


FIGURES: Mapping[int, Figure] = {
    1: Figure("ListTransactions on SQLite, to the ceiling", reading.sqlite),
    2: Figure("ListTransactions on PostgreSQL, to the ceiling", reading.postgresql),
    3: Figure("Each facade's page on SQLite, to the ceiling", reading.facades),
    4: Figure("List over REST on SQLite, to FastAPI", rest.sqlite),
    5: Figure("List over REST on PostgreSQL, to FastAPI", rest.postgresql),
    6: Figure("CreateTransaction of 64 callers, to the ceiling", writing.to_ceiling),
    7: Figure("CreateTransaction of 64 callers, to a commit for each call", writing.to_one_at_a_time),
    8: Figure("BatchCreateTransactions of 500", writing.batches),
    9: Figure("A page far down and in a large ledger, to one at the top and in a small one", depth.measure),
    10: Figure("Two workers, to one", workers.measure),
    11: Figure("p99 to p50 of the list, at half of its peak rate", latency.measure),
    12: Figure("Memory of a worker", memory.measure),
    13: Figure("From the start to the first answer", starting.measure),
    14: Figure("Import of history on SQLite", importing.measure),
    15: Figure("Second page over REST, to FastAPI", rest.second_page),
    16: Figure("List over REST on SQLite, to gRPC", rest.to_grpc),
    17: Figure("Each facade's page over REST on SQLite, to FastAPI", rest.facades),
    18: Figure("Processor time of a page over REST on SQLite", rest.processor_time),
    19: Figure("Ten times the limit", overload.measure),
}
