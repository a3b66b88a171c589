"""The commands that call a server: their output, their errors and exit statuses, and how they connect."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from daybook_client import AccountKind, NewTransaction, Posting, TransactionKind
from daybook_client.errors import BY_STATUS
from docs.generate import leaf_commands
from server.cli import COMMANDS, output
from server.cli import connection as cli_connection
from server.cli.connection import EXIT_STATUSES
from tests.support.command_line import invoke, require_command
from tests.support.processes import command, environment, free_port, run
from tests.support.python_clients import ServedLedger
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import SECONDS_MAX

TRANSCRIPT = Path(__file__).with_name("transcript.txt")
MODULES = {"accounts", "transactions", "export"}
"""The modules of the commands that call a server."""


class Names:
    """Replaces what differs between runs: uids by the request_id of their transaction, times, etags."""

    def __init__(self) -> None:
        self.uids: dict[str, str] = {}

    def learn(self, output: str) -> None:
        """Finds the uid of a transaction in JSON."""
        for uid, request_id in re.findall(r'"uid":"([0-9a-f-]{36})".*?"requestId":"([a-z]+)"', output):
            self.uids.setdefault(request_id, uid)

    def replace(self, output: str) -> str:
        """Returns the output with placeholders."""
        for request_id, uid in self.uids.items():
            output = output.replace(uid, f"<{request_id}>")
        output = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "<uuid>", output)
        output = re.sub(r"\d{4}-\d\d-\d\d([ T])\d\d:\d\d:\d\d(\.\d+)?(?=Z?)", r"<time>", output)
        output = re.sub(r"\b[0-9a-f]{16}\b", "<etag>", output)
        # Padding of tables depends on what was replaced.
        return re.sub(r" +$", "", output, flags=re.MULTILINE).replace("\r\n", "\n")

    def insert(self, line: str) -> str:
        """Returns a command with uids instead of placeholders."""
        for request_id, uid in self.uids.items():
            line = line.replace(f"<{request_id}>", uid)
        return line


def played(lines: list[str], settings: Mapping[str, str]) -> Iterator[str]:
    """Runs commands, and yields each with its output and its exit status."""
    names = Names()
    for line in lines:
        result = invoke(*shlex.split(names.insert(line))[2:], settings=settings)
        names.learn(result.stdout)
        status = f"exit {result.exit_code}\n" if result.exit_code else ""
        yield f"{line}\n{names.replace(result.stdout)}{names.replace(result.stderr)}{status}\n"


def test_commands_print_what_the_transcript_says(tmp_path: Path) -> None:
    """Every command of the transcript has the output and the exit status that follow it there."""
    ledger = ServedLedger.start(tmp_path)
    expected = TRANSCRIPT.read_text()
    lines = [line for line in expected.splitlines() if line.startswith("$ ")]
    found = "".join(played(lines, {"DAYBOOK_ADDRESS": ledger.address, "DAYBOOK_KEY": ledger.key}))
    assert ledger.daybook.stop() == 0
    assert found == expected


def test_each_status_has_an_exit_status() -> None:
    """Every gRPC status of the client's errors has an exit status, except internal errors."""
    statuses = {status.name for status in BY_STATUS if status is not None}
    assert statuses - EXIT_STATUSES.keys() == {"INTERNAL"}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_unreachable_server_is_reported_in_one_line(
    connection: Mapping[str, str], ledger: ServedLedger, tmp_path: Path, scheme: str
) -> None:
    """Without a server, or with TLS where the server has none, one line names the address; the status is 75."""
    address = f"{scheme}://127.0.0.1:{free_port()}" if scheme == "http" else f"https://{ledger.address}"
    result = run("balance", "acme", "--address", address, folder=tmp_path, settings=connection)
    assert (result.returncode, result.stdout) == (75, "")
    assert re.fullmatch(rf"daybook: {address} can't be reached: .*\n", result.stderr)
    assert ("use http://" in result.stderr) == (scheme == "https")


def test_server_that_does_not_answer_is_reported(
    connection: Mapping[str, str], ledger: ServedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the deadline, one line says that the server did not answer; the status is 75."""
    monkeypatch.setattr(cli_connection, "TIMEOUT_SECONDS", 0.2)
    with TcpProxy.before(ledger.port) as proxy:
        proxy.withhold_answers()
        address = f"127.0.0.1:{proxy.port}"
        result = invoke("balance", "acme", "--address", address, settings=connection)
    assert (result.exit_code, result.stderr) == (75, f"daybook: {address} did not answer before the deadline\n")


def test_unanswered_mutation_names_its_request_id(connection: Mapping[str, str]) -> None:
    """A mutation without an answer says how to repeat it: with the given request_id, or the one of the client."""
    record = ("transactions", "record", "acme", "--kind", "grant", "--category", "purchase", "--amount", "1")
    address = ("--address", f"127.0.0.1:{free_port()}")
    assert re.search(r"--request-id [0-9a-f-]{36}, ", invoke(*record, *address, settings=connection).stderr)
    assert "--request-id mine, " in invoke(*record, *address, "--request-id", "mine", settings=connection).stderr
    assert "--request-id" not in invoke("balance", "acme", *address, settings=connection).stderr


def profiles(connection: Mapping[str, str], text: str, mode: int = 0o600) -> Path:
    """Writes the file of profiles."""
    file = Path(connection["XDG_CONFIG_HOME"]) / "daybook" / "profiles.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)
    return file


def error(settings: Mapping[str, str], *arguments: str) -> str:
    """Runs `daybook accounts list`, which must fail with 2. Returns its line of error."""
    result = invoke("accounts", "list", *arguments, settings=settings)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    return line.removeprefix("daybook: ")


def test_profile_has_the_connection(connection: Mapping[str, str], ledger: ServedLedger) -> None:
    """--profile chooses a profile; without it and without variables, the profile `default` is used."""
    table = f'address = "{ledger.address}"\nkey = "{ledger.key}"\n'
    wrong = '[other]\naddress = "127.0.0.1:1"\nkey = "wrong"\n'
    profiles(connection, f"[default]\n{table}{wrong}[staging]\n{table}")
    without = {"XDG_CONFIG_HOME": connection["XDG_CONFIG_HOME"]}
    assert invoke("accounts", "list", settings=without).exit_code == 0
    assert invoke("accounts", "list", "--profile", "staging", settings=without).exit_code == 0
    wrong_variables = {**without, "DAYBOOK_ADDRESS": "127.0.0.1:1", "DAYBOOK_KEY": "wrong"}
    assert invoke("accounts", "list", "--profile", "staging", settings=wrong_variables).exit_code == 0
    unused = {**without, "DAYBOOK_CA_FILE": "/no/such/file"}
    assert invoke("accounts", "list", "--profile", "staging", settings=unused).exit_code == 0
    # The variables have precedence over the profile `default`.
    assert invoke("accounts", "list", settings=wrong_variables).exit_code == 75
    result = invoke("accounts", "list", "--profile", "other", "--address", ledger.address, settings=without)
    assert result.exit_code == 77
    assert "check the key in profile other of " in result.stderr


def test_connection_has_one_source(connection: Mapping[str, str], ledger: ServedLedger) -> None:
    """A profile and the environment are never mixed, so that a key is not sent to the server of another."""
    file = profiles(connection, f'[default]\nkey = "{ledger.key}"\n')
    assert error(connection, "--profile", "default") == f"profile default of {file} has no address"
    assert error({**connection, "DAYBOOK_KEY": ""}).startswith("no key: set DAYBOOK_ADDRESS and DAYBOOK_KEY, or ")
    file.unlink()
    assert error({**connection, "DAYBOOK_ADDRESS": ""}) == (
        f"no address: set DAYBOOK_ADDRESS and DAYBOOK_KEY, or write a profile to {file}"
    )


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_profiles_that_others_can_read_are_refused(connection: Mapping[str, str], mode: int) -> None:
    """A file of profiles with permissions for others is refused, with the command that corrects it."""
    file = profiles(connection, "", mode)
    assert error(connection, "--profile", "default").endswith(f"run chmod 600 {file}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[x]\n", "there is no profile default; {file} has: x"),
        ("[default\n", "{file} is no TOML: "),
        ("default = 1\n", "profile default of {file} must be a table of texts: address, key, ca_file, "),
        ("[default]\naddress = 1\n", "profile default of {file} must be a table of texts: address, key, ca_file, "),
        ("[default]\ntoken = 'x'\n", "profile default of {file} has token; the settings are address, key, ca_file, "),
        ("[default]\naddress = 'x'\nkey = 'x'\n", "profile default of {file}: 'x' has no port"),
    ],
)
def test_wrong_profile_is_refused(connection: Mapping[str, str], text: str, words: str) -> None:
    """A profile that is missing or wrong is reported in one line with its file."""
    file = profiles(connection, text)
    assert error(connection, "--profile", "default").startswith(words.format(file=file))


def seen_on_terminal(folder: Path, settings: Mapping[str, str], *arguments: str) -> str:
    """Runs a command on a terminal of 60 columns. Returns what it wrote."""
    terminal, end = pty.openpty()
    variables = environment(**settings, TERM="xterm-256color", COLUMNS="60")
    with subprocess.Popen(command(*arguments), cwd=folder, env=variables, stdout=end, stderr=end) as process:
        os.close(end)
        written = b""
        try:
            while data := os.read(terminal, 65_536):
                written += data
        except OSError:
            # Linux reports the end of a terminal as an error.
            pass
        os.close(terminal)
        assert process.wait(SECONDS_MAX) == 0
    return written.decode()


def test_colors_are_for_terminals(connection: Mapping[str, str], ledger: ServedLedger, tmp_path: Path) -> None:
    """A terminal gets colors, unless NO_COLOR is set, and lines of its width. A pipe gets neither, nor do programs."""
    with ledger.client() as client:
        client.create_account("colors", AccountKind.SPACE, credit_limit=5)
        client.create_transaction(
            "accounts/colors", NewTransaction(TransactionKind.CHARGE, "inference", -1, description="x" * 99)
        )
    arguments = ("transactions", "list", "colors")
    red = "\x1b[31m"
    shown = seen_on_terminal(tmp_path, connection, *arguments)
    assert red in shown
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()) for line in shown.splitlines()) <= 60
    assert red not in seen_on_terminal(tmp_path, {**connection, "NO_COLOR": "1"}, *arguments)
    piped = run(*arguments, folder=tmp_path, settings=connection).stdout
    assert "\x1b" not in piped
    assert "x" * 99 in piped
    assert "\x1b" not in seen_on_terminal(tmp_path, connection, *arguments, "--output", "csv")


def test_control_characters_are_not_printed_in_tables(connection: Mapping[str, str], ledger: ServedLedger) -> None:
    """A text of another user can't control the terminal."""
    with ledger.client() as client:
        client.create_account("control", AccountKind.SPACE, display_name="a\x1b[31mb\u202ec")
    for arguments in (("get", "control"), ("list",)):
        shown = invoke("accounts", *arguments, settings=connection).stdout
        assert "a [31mb c" in shown


def test_table_has_a_limit_and_other_forms_have_all_rows(
    connection: Mapping[str, str], ledger: ServedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table ends after its default limit, with a remark. The other forms have all rows, over all pages."""
    monkeypatch.setattr(output, "TABLE_ROWS", 3)
    monkeypatch.setattr(output, "PAGE_SIZE", 2)
    with ledger.client() as client:
        client.create_account("many", AccountKind.SPACE)
        client.batch_create_transactions(
            [Posting("accounts/many", NewTransaction(TransactionKind.GRANT, "gift", 1))] * 7
        )

    def rows(*arguments: str) -> tuple[int, bool]:
        result = invoke("transactions", "list", "many", *arguments, settings=connection)
        assert result.exit_code == 0
        return result.stdout.count("GRANT"), "more rows follow" in result.stderr

    assert rows() == (3, True)
    assert rows("--limit", "6") == (6, True)
    assert rows("--limit", "7") == (7, False)
    for form in ("json", "ndjson", "csv"):
        assert rows("--output", form) == (7, False)
        assert rows("--output", form, "--limit", "5") == (5, False)


def test_closed_pipe_ends_a_list_quietly(connection: Mapping[str, str], ledger: ServedLedger, tmp_path: Path) -> None:
    """If the reader of the output ends, so does the command, without a message."""
    with ledger.client() as client:
        client.create_account("piped", AccountKind.SPACE)
        posting = Posting("accounts/piped", NewTransaction(TransactionKind.GRANT, "gift", 1, description="x" * 1000))
        client.batch_create_transactions([posting] * 500)
    for arguments in (("transactions", "list", "piped", "--output", "csv"), ("export", "-", "--format", "ndjson")):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            result = subprocess.run(
                command(*arguments),
                cwd=tmp_path,
                env=environment(**connection),
                stdout=pipe,
                stderr=subprocess.PIPE,
                text=True,
                timeout=SECONDS_MAX,
                check=False,
            )
        assert (result.returncode, result.stderr) == (1, "")


def test_priority_out_of_range_names_the_range(connection: Mapping[str, str]) -> None:
    """A priority that no transaction can have is refused with its bounds."""
    record = ("transactions", "record", "acme", "--kind", "grant", "--category", "gift", "--amount", "1")
    result = invoke(*record, "--priority", "99999999999", settings=connection)
    assert result.exit_code == 2
    assert "--priority" in result.stderr
    assert "1000" in result.stderr


CLIENT_COMMANDS = {name: leaf for name, leaf in leaf_commands() if COMMANDS[name.split()[0]].module in MODULES}


@pytest.mark.parametrize("name", CLIENT_COMMANDS)
def test_help_has_an_example(name: str) -> None:
    """The help of each command that calls a server ends with an example of this command, which it accepts."""
    (example,) = re.findall(r"Example: `daybook (.*)`$", " ".join(CLIENT_COMMANDS[name].help.split()))
    assert example.startswith(f"{name} ")
    require_command(*shlex.split(example))


def test_shell_completes_commands_and_options(tmp_path: Path) -> None:
    """The completion of a shell knows commands, their subcommands and their options."""

    def completed(words: str, index: int) -> list[str]:
        settings = {"_DAYBOOK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        return run(folder=tmp_path, settings=settings).stdout.split()

    assert completed("daybook acc", 1) == ["accounts"]
    assert completed("daybook accounts ", 2) == ["list", "get", "create", "update"]
    assert completed("daybook accounts list --out", 3) == ["--output"]
