"""Figure 12: the memory of a worker."""

from __future__ import annotations

from bench.calls import list_call, read_page
from bench.report import Finding, at_most
from bench.servers import Server, daybook
from bench.stage import Stage
from server.ledger.names import ALL_ACCOUNTS

MEGABYTE = 1_000_000
IDLE_MEGABYTES_MAX = 110
BUSY_MEGABYTES_MAX = 150
GROWTH_MAX = 1.05
"""An allocator still grows a little after all code has run once."""
_STEP = 1000
_ROWS_EXPORTED_MAX = 1_000_000
_WARM = 0.1
"""The fraction of the work after which caches should be full."""


def measure(stage: Stage) -> list[Finding]:
    """Measures the largest memory and its growth: idle, during many lists and during an export."""
    with daybook(stage.large.database_url) as server:
        idle = server.resident_bytes
        lists = _sizes_while_listing(stage, server)
        export = _sizes_while_exporting(stage, server)
    return [
        _size("idle", [idle], IDLE_MEGABYTES_MAX),
        _size(f"after {stage.lists:,} lists", lists, BUSY_MEGABYTES_MAX),
        _growth(f"growth over {stage.lists:,} lists", lists),
        _size(f"exporting {_rows_exported(stage):,} rows", export, BUSY_MEGABYTES_MAX),
        _growth(f"growth over {_rows_exported(stage):,} rows exported", export),
    ]


def _size(what: str, sizes: list[int], megabytes_max: int) -> Finding:
    return Finding(12, what, max(sizes) / MEGABYTE, "MB", at_most(megabytes_max))


def _growth(what: str, sizes: list[int]) -> Finding:
    """The last size, divided by the size after a tenth of the work."""
    warm = sizes[int(len(sizes) * _WARM)]
    return Finding(12, what, sizes[-1] / warm, "", at_most(GROWTH_MAX))


def _sizes_while_listing(stage: Stage, server: Server) -> list[int]:
    stage.log(f"{stage.lists:,} lists")
    call = list_call(stage.large.key, ALL_ACCOUNTS)
    page = call.answers(server.port)
    done, sizes = 0.0, []
    while done < stage.lists:
        done += stage.seconds * call.rate_of_same(server.port, stage.seconds, page)
        sizes.append(server.resident_bytes)
    return sizes


def _rows_exported(stage: Stage) -> int:
    return min(_ROWS_EXPORTED_MAX, stage.rows_large)


def _sizes_while_exporting(stage: Stage, server: Server) -> list[int]:
    """Measures while the list is read in pages of the largest size."""
    stage.log(f"exporting {_rows_exported(stage):,} rows")
    token, sizes = "", []
    for _ in range(_rows_exported(stage) // _STEP):
        (answer,) = list_call(stage.large.key, ALL_ACCOUNTS, token, _STEP).answers(server.port)
        token = read_page(answer, _STEP).next_page_token
        sizes.append(server.resident_bytes)
    return sizes
