"""The command that imports history."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TextColumn

from daybook_client import AccountKind, Daybook, DaybookError
from server.cli.connection import INTERRUPTED, REFUSED, Address, Failure, Profile, connected
from server.cli.output import console
from server.cli.values import read_time
from server.importing.fields import account_id
from server.importing.found import Found, Options, Page, Problem, Reader, Row, SourceInvalid
from server.importing.gathering import gather
from server.importing.http import Api, parse_json
from server.importing.plan import ImportRefused, Plan, make_plan
from server.importing.posting import create_accounts, post
from server.importing.readers import reader, vendors
from server.importing.report import Totals, account_lines, kept_lines
from server.importing.spool import Spool
from server.importing.table import columns_of, read_mapping, rows

TOKEN_VARIABLE = "SOURCE_TOKEN"  # noqa: S105  # the name of a variable
FAR_FUTURE = "9999-12-31T23:59:59Z"

app = typer.Typer()


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the rows come from."""

    name: str
    """The beginning of request_ids."""
    found: Callable[[Callable[[str], None]], Iterator[Found]]
    """Reads the source, and reports each page and each wait."""
    newest_first: bool
    columns: Mapping[str, str]


@app.command("import")
def import_history(
    *,
    files: Annotated[
        list[Path] | None, typer.Argument(help="JSON pages of the vendor, newest first, or one CSV file.")
    ] = None,
    vendor: Annotated[
        str | None, typer.Option("--from", help=f"Vendor whose pages are read: {', '.join(vendors())}.")
    ] = None,
    source_address: Annotated[
        str | None,
        typer.Option(help="Base URL of the vendor's API; by default, the documented one.", show_default=False),
    ] = None,
    source_token_file: Annotated[
        Path | None,
        typer.Option(
            help=f"File with the token of the vendor's API; by default, the variable {TOKEN_VARIABLE}.",
            show_default=False,
        ),
    ] = None,
    account: Annotated[str, typer.Option(help="Id of Teable's space or Dreadnode's organization.")] = "",
    network: Annotated[str, typer.Option(help="Network id of Spacebring, with an access token.")] = "",
    since: Annotated[
        datetime | None,
        typer.Option(
            help="Start of the history as an RFC 3339 time; by default, all of it.",
            parser=read_time,
            metavar="TIME",
            show_default=False,
        ),
    ] = None,
    expire_time: Annotated[
        datetime,
        typer.Option(
            help="Expiry of expiring credits that are left at the end, as an RFC 3339 time.",
            parser=read_time,
            metavar="TIME",
        ),
    ] = FAR_FUTURE,  # type: ignore[assignment]  # Typer parses it
    mapping: Annotated[Path | None, typer.Option(help="TOML file that maps the columns of a CSV file.")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--map", help="Field of a CSV column, like Customer=account; may be repeated.")
    ] = None,
    constant: Annotated[
        list[str] | None,
        typer.Option("--set", help="Value of a field in all rows, like category=purchase; may be repeated."),
    ] = None,
    account_kind: Annotated[
        AccountKind, typer.Option(help="Kind of the accounts that a CSV file creates.")
    ] = AccountKind.OTHER,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Shows what would be imported. Changes nothing.")] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Imports the other rows if some can't be imported.")
    ] = False,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Imports history from a vendor's API, from its saved pages, or from a CSV file.

    Repeating the command adds nothing, and continues an interrupted import. The key needs the scope `admin`.

    Example: `daybook import --from teable --account spcStudio --dry-run`
    """
    if vendor is not None and (mapping or column or constant):
        raise typer.BadParameter("--mapping, --map and --set are for a CSV file, without --from")
    with connected(profile, address) as client, ExitStack() as stack:
        options = Options(
            account_id=account,
            account_kind=account_kind,
            network=network,
            since=since,
            now=datetime.now(UTC),
            expire_time=expire_time,
        )
        if vendor is None:
            columns = read_mapping(mapping, column or (), constant or ())
            source = _csv_source(files or [], lambda file: rows(file, columns), columns_of(columns))
        else:
            source = _vendor_source(stack, vendor, files or [], source_address, source_token_file, options)
        try:
            _run(stack, source, options, client, dry_run=dry_run, skip_bad_rows=skip_bad_rows)
        except ImportRefused as error:
            raise Failure(str(error), REFUSED) from None
        except DaybookError as error:
            # Repeating the command repeats none of its calls.
            error.request_id = ""
            error.add_note("run the same command again to continue")
            raise
        except KeyboardInterrupt:
            raise Failure("interrupted: run the same command again to continue", INTERRUPTED) from None


def _run(
    stack: ExitStack, source: _Source, options: Options, client: Daybook, *, dry_run: bool, skip_bad_rows: bool
) -> None:
    spool = stack.enter_context(Spool(source.name, newest_first=source.newest_first))
    with _progress() as progress:
        task = progress.add_task("reading", total=None)
        gathered = gather(
            source.found(lambda doing: progress.update(task, description=doing)),
            spool,
            options,
            lambda count: progress.update(task, completed=count),
            source.columns,
        )
        progress.update(task, description="comparing with the ledger")

        def leave_out(row: Row) -> None:
            # A vendor's row that is read twice may have changed meanwhile: the newer one is imported.
            if not source.newest_first:
                gathered.problems.add(Problem(row.place, f"has the request_id {row.past.request_id} of another row"))

        plan = make_plan(source.name, spool.rows(leave_out), gathered, client, options)
    for line in kept_lines("rows can't be imported", gathered.problems):
        typer.echo(line, err=not dry_run)
    refuses = bool(gathered.problems.count) and not skip_bad_rows
    totals = Totals()
    if dry_run or refuses:
        for _ in totals.tap(plan.items(spool)):
            pass
        for line in account_lines(plan):
            typer.echo(line)
        _report(plan, totals)
        if refuses:
            typer.echo("Nothing is imported: see --skip-bad-rows.", err=True)
            raise typer.Exit(1)
        return
    _post(plan, spool, client, totals)
    _report(plan, totals)


def _post(plan: Plan, spool: Spool, client: Daybook, totals: Totals) -> None:
    with _progress() as progress:
        task = progress.add_task("creating accounts", total=None)
        created = create_accounts(plan, client)
        progress.update(task, description="posting", total=plan.row_count)
        posted = post(plan, totals.tap(plan.items(spool)), client, lambda count: progress.advance(task, count))
    typer.echo(
        f"{posted.imported_count} transactions imported, {posted.skipped_count} already there, "
        f"{created} accounts created"
    )
    for request_id in posted.changed:
        typer.echo(
            f"{request_id}: not imported: a row with this request_id and other content was imported before", err=True
        )


def _report(plan: Plan, totals: Totals) -> None:
    for line in totals.lines():
        typer.echo(line)
    for line in kept_lines("differences", plan.differences):
        typer.echo(line)


def _vendor_source(
    stack: ExitStack, vendor: str, files: list[Path], address: str | None, token_file: Path | None, options: Options
) -> _Source:
    found = reader(vendor)
    if found.needs_account and not options.account_id:
        raise ValueError(f"pages of {found.vendor} don't name their account: give --account")
    if options.account_id:
        account_id(options.account_id)
    if files:
        if address is not None:
            raise ValueError("give files or --source-address, not both")
        return _Source(vendor, lambda report: found.rows(_saved(files, report), options), True, {})
    base = address or found.address
    if not base:
        raise ValueError(f"{found.vendor} documents no address: give --source-address, or files")
    headers = found.headers(_token(token_file), options)

    def live(report: Callable[[str], None]) -> Iterator[Found]:
        def wait(seconds: float, reason: str) -> None:
            report(f"waiting {seconds:.0f} s: {reason[:80]}")

        api = stack.enter_context(Api(base, headers, on_wait=wait))
        return found.rows(_reported(found, api, options, report), options)

    return _Source(vendor, live, True, {})


def _reported(found: Reader, api: Api, options: Options, report: Callable[[str], None]) -> Iterator[Page]:
    for page in found.pages(api, options):
        report("reading")
        yield page


def _saved(files: list[Path], report: Callable[[str], None]) -> Iterator[Page]:
    for file in files:
        report(f"reading {file.name}")
        try:
            yield Page(str(file), parse_json(file.read_bytes()))
        except ValueError as error:
            raise SourceInvalid(f"{file}: {error}") from None


def _csv_source(files: list[Path], read: Callable[[Path], Iterator[Found]], columns: Mapping[str, str]) -> _Source:
    if len(files) != 1:
        raise ValueError("give one CSV file, or --from with a vendor")
    return _Source("csv", lambda _report: read(files[0]), False, columns)


def _token(file: Path | None) -> str:
    token = os.environ.get(TOKEN_VARIABLE, "") if file is None else file.read_text()
    if not token.strip():
        raise ValueError(f"no token: set {TOKEN_VARIABLE}, or give --source-token-file")
    if not (token.strip().isascii() and token.strip().isprintable()):
        raise ValueError("the token of the source has characters other than printable ASCII")
    return token.strip()


def _progress() -> Progress:
    shown = console(stderr=True)
    return Progress(
        *Progress.get_default_columns(),
        TextColumn("{task.completed:,} rows"),
        console=shown,
        transient=True,
        disable=not shown.is_terminal,
    )
