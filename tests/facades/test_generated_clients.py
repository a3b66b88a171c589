"""The programs and commands of docs/clients.md are compiled from the contracts and call the demo.

A test whose toolchain is not installed isn't collected; pytest's header names the toolchain. A test whose libraries
can't be downloaded is skipped. The folders of clients/ pin the libraries' versions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daybook.v1.ledger_service_pb2 import ListTransactionsRequest
from google.api.annotations_pb2 import http

from protos import generate
from server.app import SERVICES
from server.demo import dreadnode, nebulablock, spacebring, teable
from server.demo.load import SECRET
from tests.support.callers import NativeCaller, credential
from tests.support.demo import DREADNODE
from tests.support.http_client import send
from tests.support.methods import METHODS
from tests.support.processes import BIN, Daybook, free_port
from tests.support.toolchains import with_tools
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "clients.md").read_text()
PINS = Path(__file__).parent / "clients"
EXAMPLES = ROOT / "examples"
BUILD_SECONDS_MAX = 600
"""A deadline long enough to compile on a busy machine with empty caches."""

pytestmark = pytest.mark.long


def blocks(language: str) -> list[str]:
    """The code blocks of the guide in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert found
    return found


def command_line(start: str) -> str:
    """The command of the guide that begins with `start`."""
    (found,) = re.findall(rf"^({re.escape(start)}.*)$", "".join(blocks("sh")), re.MULTILINE)
    return str(found)


def run(command: str | list[str], folder: Path, **settings: str) -> str:
    """Runs a command, a string in a shell; returns its standard output. Fails if its exit code is not 0."""
    path = os.pathsep.join(filter(None, (settings.pop("PATH", ""), str(BIN), os.environ["PATH"])))
    result = subprocess.run(
        ["sh", "-c", command] if isinstance(command, str) else command,
        cwd=folder,
        env={**os.environ, **settings, "PATH": path},
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS_MAX,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def download(command: str, folder: Path) -> None:
    """Runs a command that downloads libraries; skips the test if it fails, as without a network."""
    result = subprocess.run(
        ["sh", "-c", command], cwd=folder, capture_output=True, timeout=BUILD_SECONDS_MAX, check=False
    )
    if result.returncode != 0:
        pytest.skip(f"`{command}` can't get the libraries")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like a checkout with only the contracts, and an empty folder `client`."""
    (tmp_path / "client").mkdir()
    (tmp_path / "protos").symlink_to(generate.PROTOS)
    return tmp_path


@pytest.fixture(scope="module")
def newest(native: NativeCaller) -> list[str]:
    """The expected output of every program: the newest two transactions, each with its amount."""
    request = ListTransactionsRequest(parent=f"accounts/{dreadnode.ORGANIZATION}", page_size=2)
    page = native.ledger.ListTransactions(request, metadata=credential(DREADNODE))
    return [f"{each.name} {each.amount}" for each in page.transactions]


@pytest.fixture(scope="session")
def go_programs(gateway: Daybook, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Go module with the code of protos/buf.gen.yaml, and `client`, `gateway` and the example `charge` in bin/."""
    module = tmp_path_factory.mktemp("shop")
    for name in ("go.mod", "go.sum"):
        shutil.copyfile(PINS / "go" / name, module / name)
    download("go mod download", module)
    run("go install tool", module, GOBIN=str(module / "bin"))
    run(command_line("cd protos && buf generate").replace("../../shop", str(module)), ROOT, PATH=str(module / "bin"))
    for name, program in zip(("client", "gateway"), blocks("go"), strict=True):
        (module / name).mkdir()
        (module / name / "main.go").write_text(directed_at(gateway, program))
    shutil.copytree(EXAMPLES / "go", module / "charge")
    run("go vet ./... && go build -o bin/ ./client ./gateway ./charge", module)
    assert run("gofmt -l client gateway charge", module) == ""
    return module


def directed_at(gateway: Daybook, text: str) -> str:
    """A program or command with the ports of the tests' server and gateway in place of the documented ones."""
    assert "127.0.0.1:50051" in text or "127.0.0.1:8080" in text
    ports = {"127.0.0.1:50051": gateway.ports.server, "127.0.0.1:8080": gateway.ports.gateway}
    for documented, port in ports.items():
        text = text.replace(documented, f"127.0.0.1:{port}")
    return text


def with_python(gateway: Daybook, folder: Path) -> str:
    """The Python client, without the server's packages."""
    (program,) = blocks("python")
    (folder / "client.py").write_text(directed_at(gateway, program))
    # Without the paths of this environment, which lead to the server.
    paths = [str(ROOT / "clients" / "python"), *(path for path in sys.path if path.endswith("site-packages"))]
    return run([sys.executable, "-S", "client.py"], folder, PYTHONPATH=os.pathsep.join(paths))


def with_proto_loader(gateway: Daybook, folder: Path) -> str:
    """Node without generated code."""
    install_npm(folder)
    (program,) = blocks("js")
    (folder / "client.cjs").write_text(directed_at(gateway, program))
    return run(["node", "client.cjs"], folder)


TYPESCRIPT_OPTIONS = ("--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022")


def generate_typescript(folder: Path) -> None:
    """Generates the client of Connect, and installs its libraries."""
    install_npm(folder)
    run(command_line("PATH=$PWD/node_modules/.bin:$PATH buf generate"), folder)


def with_typescript(gateway: Daybook, folder: Path) -> str:
    """Connect's client over gRPC, and over the transports for browsers: gRPC-Web and Connect."""
    generate_typescript(folder)
    (program,) = blocks("ts")
    (grpc_transport,) = re.findall(r"createGrpcTransport\(.*? \}\)", program)
    programs = {"client": program}
    for name, transport in re.findall(r"^- `(create(?:GrpcWeb|Connect)Transport)(\(.*? \}\))`", GUIDE, re.MULTILINE):
        call = f"{name}{transport}".replace("{ ", '{ httpVersion: "1.1", ')
        programs[name] = program.replace(grpc_transport, call).replace("{ createGrpcTransport }", f"{{ {name} }}")
    assert len(programs) == 3
    for name, text in programs.items():
        (folder / f"{name}.ts").write_text(directed_at(gateway, text))
    run(["node_modules/.bin/tsc", *TYPESCRIPT_OPTIONS, *(f"{name}.ts" for name in programs)], folder)
    (printed,) = {run(["node", f"{name}.js"], folder) for name in programs}
    return printed


def install_npm(folder: Path) -> None:
    """Installs the pinned packages."""
    shutil.copyfile(PINS / "typescript" / "package.json", folder / "package.json")
    download("npm install --silent --no-audit --no-fund --no-package-lock", folder)


def with_java(gateway: Daybook, folder: Path) -> str:
    """grpc-java with the stubs of its plugin."""
    run(command_line("protoc -I protos"), folder)
    (program,) = blocks("java")
    (folder / "Client.java").write_text(directed_at(gateway, program))
    compile_java(folder)
    return run(["java", "-cp", "classes:lib/*", "Client"], folder)


def compile_java(folder: Path) -> None:
    """Compiles every class in the folder."""
    shutil.copyfile(PINS / "java" / "pom.xml", folder / "pom.xml")
    download("mvn --quiet --batch-mode dependency:copy-dependencies -DoutputDirectory=lib", folder)
    run("javac -cp 'lib/*' -d classes $(find . -name '*.java')", folder)


def with_command(name: str) -> Callable[[Daybook, Path], str]:
    """The guide's command that lists transactions with a tool."""

    def call(gateway: Daybook, folder: Path) -> str:
        (command,) = [each for each in blocks("sh") if each.startswith(name) and "describe" not in each]
        page = json.loads(run(directed_at(gateway, command), folder))
        return "".join(f"{each['name']} {each['amount']}\n" for each in page["transactions"])

    return call


CLIENTS: dict[str, tuple[Callable[[Daybook, Path], str], tuple[str, ...]]] = {
    "python": (with_python, ()),
    "buf-curl-grpc": (with_command("buf curl --protocol grpc"), ()),
    "buf-curl-connect": (with_command("buf curl -H"), ()),
    "grpcurl": (with_command("grpcurl"), ("grpcurl",)),
    "typescript": (with_typescript, ("typescript",)),
    "proto-loader": (with_proto_loader, ("typescript",)),
    "java": (with_java, ("java-stubs",)),
}


@pytest.mark.parametrize("client", [name for name, (_, needs) in CLIENTS.items() if with_tools(*needs)])
def test_generated_client_lists_transactions(gateway: Daybook, newest: list[str], folder: Path, client: str) -> None:
    """A client generated from the contracts by the guide's commands lists the newest transactions."""
    call, _ = CLIENTS[client]
    assert call(gateway, folder).splitlines() == newest


EXAMPLE_OUTPUT = "CHARGE -0.25 19.75\nGRANT 20 20\n"


def require_example(gateway: Daybook, command: list[str], folder: Path, **settings: str) -> None:
    """Runs an example twice on a new account. Fails unless both runs print its history."""
    assert EXAMPLE_OUTPUT in (EXAMPLES / "README.md").read_text()
    server = {"DAYBOOK_ADDRESS": f"127.0.0.1:{gateway.ports.server}", "GATEWAY": gateway.origin}
    account_id = f"example-{uuid.uuid4()}"
    for _ in range(2):
        assert run([*command, account_id], folder, **server, **settings) == EXAMPLE_OUTPUT


def test_python_example(gateway: Daybook, folder: Path) -> None:
    """The example in Python runs twice with the same effect."""
    path = str(ROOT / "clients" / "python")
    require_example(gateway, [sys.executable, str(EXAMPLES / "python/charge.py")], folder, PYTHONPATH=path)


@pytest.mark.parametrize("script", [each for each in ("charge.sh", "charge-grpc.sh") if with_tools("jq")])
def test_shell_example(gateway: Daybook, folder: Path, script: str) -> None:
    """The examples for a shell run twice with the same effect."""
    require_example(gateway, [str(EXAMPLES / "shell" / script)], folder)


if with_tools("typescript"):

    def test_typescript_example(gateway: Daybook, folder: Path) -> None:
        """The example in TypeScript runs twice with the same effect."""
        generate_typescript(folder)
        shutil.copyfile(EXAMPLES / "typescript/charge.ts", folder / "charge.ts")
        run(["node_modules/.bin/tsc", *TYPESCRIPT_OPTIONS, "charge.ts"], folder)
        require_example(gateway, ["node", "charge.js"], folder)


def test_guide_registers_every_service() -> None:
    """The guide's grpc-gateway registers every service of the contracts."""
    registered = re.findall(r"(\w+)\.Register(\w+)Handler\b", GUIDE)
    assert sorted(registered) == sorted((full_name.split(".")[-3], full_name.split(".")[-1]) for full_name in SERVICES)


PROTOC_OUTPUTS = ("cpp", "csharp", "java", "kotlin", "objc", "php", "pyi", "python", "ruby")


@pytest.mark.parametrize("language", PROTOC_OUTPUTS)
def test_protoc_generates_without_warnings(folder: Path, language: str) -> None:
    """protoc generates code for each of its languages without a warning."""
    files = [str(generate.PROTOS / name) for name in generate.files_in(generate.PROTOS)]
    include = [f"-I{generate.PROTOS}", f"-I{generate.GOOGLE_PROTOS}"]
    result = subprocess.run(
        [str(BIN / "protoc"), *include, f"--{language}_out=client", *files],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    generated = {str(path.relative_to(folder / "client")) for path in (folder / "client").rglob("*") if path.is_file()}
    assert len(generated) >= len(files)
    if language == "java":
        assert "com/example/daybook/v1/Transaction.java" in generated
        assert not [name for name in generated if "OuterClass" in name]
    if language == "csharp":
        # protoc writes all C# files into one folder.
        assert "namespace Daybook.V1 {" in (folder / "client" / "Transaction.cs").read_text()


if with_tools("java"):

    def test_java_messages_compile(folder: Path) -> None:
        """The Java messages of every contract compile with the pinned libraries."""
        files = " ".join(f"protos/{name}" for name in generate.files_in(generate.PROTOS))
        run(f"protoc -I protos -I protos/googleapis --java_out=client {files}", folder)
        compile_java(folder)
        assert (folder / "classes/com/example/daybook/facades/teable/v1/GetSpaceCreditHistoryResponse.class").is_file()


if with_tools("grpcurl"):

    def test_grpcurl_describes_method(gateway: Daybook, folder: Path) -> None:
        """grpcurl describes a method by its name, with its REST path."""
        (command,) = [each for each in blocks("sh") if "describe" in each]
        described = run(directed_at(gateway, command), folder)
        assert "rpc ListTransactions" in described
        assert "/v1/{parent=accounts/*}/transactions" in described


if with_tools("ghz"):

    def test_ghz_calls_method_by_reflection(gateway: Daybook, folder: Path) -> None:
        """ghz calls a method without proto files, and all its calls succeed."""
        (command,) = [each for each in blocks("sh") if each.startswith("ghz")]
        report = json.loads(run(f"{directed_at(gateway, command).rstrip()} --format json", folder))
        assert report["statusCodeDistribution"] == {"OK": 100}


NATIVE, TEABLE = f"{dreadnode.KEY}.{SECRET}", f"{teable.KEY}.{SECRET}"
NEBULABLOCK, SPACEBRING = f"{nebulablock.DOCUMENTED_KEY}.{SECRET}", f"{spacebring.KEY}.{SECRET}"
ORGANIZATION = dreadnode.ORGANIZATION
TARGETS = {
    "/v1/accounts?pageSize=2": NATIVE,
    f"/v1/accounts/{ORGANIZATION}": NATIVE,
    f"/v1/accounts/{ORGANIZATION}/balance": NATIVE,
    f"/v1/accounts/{ORGANIZATION}/lots": NATIVE,
    f"/v1/accounts/{ORGANIZATION}/transactions?page_size=3&orderBy=amount&filter=kind%3DCHARGE": NATIVE,
    "/v1/accounts/unknown": NATIVE,
    "/v1/accounts?pageSize=-1": NATIVE,
    "/v1/apiKeys": NATIVE,
    f"/api/v1/org/{ORGANIZATION}/credits": NATIVE,
    f"/api/v1/org/{ORGANIZATION}/credits/transactions?limit=2&transaction_type=usage&transaction_type=storage": NATIVE,
    f"/api/org/{ORGANIZATION}/credits/transactions?limit=1": NATIVE,
    f"/api/billing/accounts/{ORGANIZATION}/transactions?page_size=2&page=2": NATIVE,
    "/api/space/spcExampleStudio/billing/credit-history?month=2024-10&take=3": TEABLE,
    "/users/credits/history?limit=2&offset=0": NEBULABLOCK,
    "/transactions/credits/v1?limit=3&createDate%5Bgte%5D=2024-10-22T14:00:00Z": SPACEBRING,
}
VOLATILE = frozenset(("nextPageToken", "nextCursor", "readTime"))
"""Fields that differ in each answer: page tokens and the time of the read."""

if with_tools("go"):

    def test_go_example(gateway: Daybook, go_programs: Path) -> None:
        """The example in Go runs twice with the same effect."""
        require_example(gateway, [str(go_programs / "bin" / "charge")], go_programs)

    def test_go_client_lists_transactions(go_programs: Path, newest: list[str]) -> None:
        """A client generated from the contracts by the guide's commands lists the newest transactions."""
        assert run([str(go_programs / "bin" / "client")], go_programs).splitlines() == newest

    @pytest.fixture(scope="module")
    def go_gateway(go_programs: Path) -> Iterator[str]:
        """The origin of a running grpc-gateway."""
        port = free_port()
        source = go_programs / "gateway" / "main.go"
        source.write_text(source.read_text().replace("127.0.0.1:8090", f"127.0.0.1:{port}"))
        run("go build -o bin/ ./gateway", go_programs)
        origin = f"http://127.0.0.1:{port}"
        with subprocess.Popen([str(go_programs / "bin" / "gateway")]) as process:
            try:
                wait_until(lambda: is_listening(origin), "the grpc-gateway listens")
                yield origin
            finally:
                process.terminate()

    def test_go_gateway_serves_what_envoy_serves(gateway: Daybook, go_gateway: str) -> None:
        """A grpc-gateway generated from the contracts has the same answers as Envoy for every API."""
        for target, key in TARGETS.items():
            headers = {"authorization": f"Bearer {key}", "spacebring-network-id": spacebring.NETWORK}
            envoy, go = (send(origin, target, headers=headers) for origin in (gateway.origin, go_gateway))
            assert go.status == envoy.status, target
            assert stable(go.body) == stable(envoy.body.replace(gateway.origin.encode(), b"")), target

    def test_go_gateway_passes_on_body_and_idempotency_key(
        gateway: Daybook, go_gateway: str, native: NativeCaller
    ) -> None:
        """The grpc-gateway passes on a body and its idempotency key: Envoy replays the same answer."""
        account_id = native.create_account(NATIVE)
        headers = {"authorization": f"Bearer {NATIVE}", "idempotency-key": "grant-1"}
        body = b'{"kind": "GRANT", "category": "purchase", "amount": "2.5"}'
        target = f"/v1/accounts/{account_id}/transactions"
        go, envoy = (
            send(origin, target, method="POST", headers={**headers, "content-type": "application/json"}, body=body)
            for origin in (go_gateway, gateway.origin)
        )
        assert go.status == 200, go.body
        assert stable(go.body) == stable(envoy.body)

    def test_openapi_document_has_every_path(go_programs: Path) -> None:
        """The OpenAPI document generated with the grpc-gateway describes every method with a REST path."""
        document = json.loads((go_programs / "gen" / "apidocs.swagger.json").read_text())
        described = [each["operationId"] for path in document["paths"].values() for each in path.values()]
        expected = {
            f"{method.containing_service.name}_{method.name}"
            for method in METHODS
            if method.containing_service is not None and method.GetOptions().Extensions[http].WhichOneof("pattern")
        }
        assert {re.sub(r"\d+$", "", each) for each in described} == expected


def is_listening(origin: str) -> bool:
    """Whether a server answers at an origin."""
    try:
        send(origin, "/")
    except ConnectionRefusedError:
        return False
    return True


def stable(body: bytes) -> object:
    """A parsed body without the fields of VOLATILE."""

    def without_volatile(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return {name: value for name, value in pairs if name not in VOLATILE}

    return json.loads(body, object_pairs_hook=without_volatile)
