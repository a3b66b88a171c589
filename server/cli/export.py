"""The command that exports transactions to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from daybook_client import DaybookError
from server.cli.connection import INTERRUPTED, Address, Failure, Profile, connected
from server.cli.export_files import Format, Rows, convert_to_parquet, partial_rows, require_parquet
from server.cli.output import console
from server.cli.transactions import Filter, OrderBy
from server.cli.values import account_name

SHOWN_EVERY = 1000
"""The number of rows between two changes of the progress."""

app = typer.Typer()


@app.command()
def export(
    *,
    file: Annotated[
        Path, typer.Argument(help="File to write; `-` is standard output.", allow_dash=True, dir_okay=False)
    ],
    form: Annotated[
        Format | None,
        typer.Option("--format", help="Format: csv, ndjson or parquet; by default, the ending of the file."),
    ] = None,
    account: Annotated[str, typer.Option(help="Id or name of the account; by default, all.", show_default=False)] = "-",
    expression: Filter = "",
    order_by: OrderBy = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continues an incomplete export of the same file.")] = False,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Exports the transactions of an account or of the tenant to a file, as of one moment.

    The file appears when it is complete; until then its rows are in a file with the ending `.part`. After an
    interruption, repeat the command with --resume.

    Example: `daybook export charges.csv --account acme --filter 'kind = CHARGE'`
    """
    chosen = form or _format_of(file)
    is_stdout = str(file) == "-"
    if is_stdout and (chosen is Format.PARQUET or resume):
        raise typer.BadParameter("standard output takes csv or ndjson, and no --resume")
    with connected(profile, address) as client, _progress() as progress:
        task = progress.add_task("exporting", total=None)

        def copy(rows: Rows) -> None:
            transactions = client.export_transactions(
                account_name(account), filter=expression, order_by=order_by, last_transaction=rows.last
            )
            for count in rows.write(transactions):
                if count % SHOWN_EVERY == 0:
                    progress.update(task, completed=count)
            progress.update(task, completed=rows.count)

        if is_stdout:
            _write_to_stdout(chosen, copy)
            return
        if chosen is Format.PARQUET:
            require_parquet()
        part = file.with_name(f"{file.name}.part")
        count = _write_part(part, chosen, copy, resume=resume)
        if chosen is Format.PARQUET:
            progress.update(task, description="converting")
            converted = file.with_name(f"{file.name}.converting")
            try:
                convert_to_parquet(part, converted)
                converted.replace(file)
            finally:
                converted.unlink(missing_ok=True)
            part.unlink()
        else:
            part.replace(file)
    typer.echo(f"exported {count:,} transactions to {file}")


def _write_to_stdout(chosen: Format, copy: Callable[[Rows], None]) -> None:
    rows = Rows(chosen.form, sys.stdout.buffer)
    try:
        rows.begin()
        copy(rows)
        rows.end()
    finally:
        sys.stdout.buffer.flush()


def _write_part(part: Path, chosen: Format, copy: Callable[[Rows], None], *, resume: bool) -> int:
    """Writes the rows of a file. Returns their number. Errors say how to continue, if there are rows."""
    try:
        with partial_rows(part, chosen.form, resume=resume) as rows:
            copy(rows)
    except (DaybookError, OSError, KeyboardInterrupt) as error:
        if not part.exists():
            raise
        advice = f"{part} has the rows so far: repeat the command with --resume"
        if isinstance(error, DaybookError):
            error.add_note(advice)
            raise
        if isinstance(error, KeyboardInterrupt):
            raise Failure(f"interrupted; {advice}", INTERRUPTED) from None
        raise Failure(f"{part}: {error.strerror}; {advice}") from None
    return rows.count


def _format_of(file: Path) -> Format:
    try:
        return Format(file.suffix.removeprefix(".").lower())
    except ValueError:
        raise typer.BadParameter("give --format, or a file that ends in .csv, .ndjson or .parquet") from None


def _progress() -> Progress:
    shown = console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,} transactions"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=shown, disable=not shown.is_terminal)
