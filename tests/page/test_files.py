"""The files that the gateway serves: the page, with its headers, on every path of a file and on no other."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import brotli
import pytest

from server.config import Settings
from server.gateway import configuration, files
from server.gateway.configuration import committed, write_deployment
from server.gateway.envoy import envoy_path
from server.gateway.files import CONTENT_TYPES, SITE, read_site, site_files
from tests.support.gateways import gateway_before
from tests.support.http_client import send
from tests.support.processes import ROOT, Ports
from tests.support.rest import reason_of
from tests.support.waiting import SECONDS_MAX, wait_until

FILES = site_files()
NO_SERVER = 9


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway without a server."""
    with gateway_before(tmp_path_factory.mktemp("gateway"), NO_SERVER) as origin:
        yield origin


@pytest.mark.parametrize("name", FILES)
def test_file_has_its_content_and_headers(origin: str, name: str) -> None:
    """A file is served as it is, also without a server, with a content type and the headers that protect a page."""
    answer = send(origin, f"/{name}")
    assert (answer.status, answer.body) == (200, FILES[name].read_bytes())
    assert answer.header("content-type") == CONTENT_TYPES[name.rpartition(".")[2]]
    policy = answer.header("content-security-policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("cache-control") == "no-cache"
    assert answer.header("x-request-id")
    head = send(origin, f"/{name}", method="HEAD")
    changing = {"date", "x-request-id"}
    assert {each for each in head.headers if each[0] not in changing} == {
        each for each in answer.headers if each[0] not in changing
    }


@pytest.mark.parametrize(("target", "images"), [("/", "'self'"), ("/docs", "'self' data:")])
def test_policy_is_strict(origin: str, target: str, images: str) -> None:
    """A page permits nothing of another origin, no inline code or style, and no eval."""
    assert send(origin, target).header("content-security-policy") == (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src {images}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("/", "index.html"),
        ("/?a=b", "index.html"),
        ("/index.html", "index.html"),
        ("/docs", "docs/index.html"),
        ("/docs/", "docs/index.html"),
        ("/docs?api=/openapi.json", "docs/index.html"),
    ],
)
def test_folder_is_served_as_its_index(origin: str, target: str, name: str) -> None:
    """The path of a folder shows its index.html, with any query."""
    answer = send(origin, target)
    assert (answer.status, answer.body) == (200, (SITE / name).read_bytes())


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_file_refuses_other_methods(origin: str, method: str) -> None:
    """A file has only GET and HEAD."""
    answer = send(origin, "/", method=method)
    assert (answer.status, answer.header("allow")) == (405, "GET, HEAD")
    assert reason_of(answer.json())[0] == "METHOD_NOT_ALLOWED"


@pytest.mark.parametrize(
    "target", ["/index", "/index.html/", "/site/index.html", "/../envoy.py", "/%2e%2e/envoy.py", "/..%2fenvoy.py"]
)
def test_other_paths_are_not_found(origin: str, target: str) -> None:
    """A path that no file of the folder has is unknown, even if the path leads to another file."""
    answer = send(origin, target)
    assert answer.status == 404
    assert reason_of(answer.json())[0] == "METHOD_NOT_FOUND"


def test_unchanged_file_is_not_sent_again(origin: str) -> None:
    """A browser that has the current version of a file gets 304; with another version it gets the file."""
    etag = send(origin, "/").header("etag")
    assert etag == f'W/"{read_site().version}"'
    answer = send(origin, "/", headers={"if-none-match": etag})
    assert (answer.status, answer.body, answer.header("etag")) == (304, b"", etag)
    assert answer.header("cache-control") == "no-cache"
    assert send(origin, "/", headers={"if-none-match": 'W/"another"'}).status == 200


def test_range_gets_the_whole_file(origin: str) -> None:
    """A request for a part gets the whole file, which HTTP permits."""
    answer = send(origin, "/", headers={"range": "bytes=1-3"})
    assert (answer.status, answer.body) == (200, (SITE / "index.html").read_bytes())
    assert answer.header("accept-ranges") is None


def test_large_file_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file of 4 MB, one of many, is served compressed; the configuration has only paths."""
    content = b"".join(b"%d\n" % number for number in range(600_000))
    folder = tmp_path / "site"
    (folder / "large").mkdir(parents=True)
    (folder / "large" / "script.js").write_bytes(content)
    for number in range(100):
        (folder / "large" / f"another-{number}.js").write_text("")
    for module in (configuration, files):
        monkeypatch.setattr(module, "SITE", folder)
    with gateway_before(tmp_path, NO_SERVER) as origin:
        assert send(origin, "/large/script.js").body == content
        answer = send(origin, "/large/script.js", headers={"accept-encoding": "br"})
        assert brotli.decompress(answer.body) == content
        assert len(answer.body) < len(content) / 3
        assert send(origin, "/").status == 404
    assert (tmp_path / "envoy.yaml").stat().st_size < 200_000


def test_version_depends_on_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change of a file's name or content changes the version."""
    monkeypatch.setattr(files, "SITE", tmp_path)
    versions = []
    for name, content in (("a.js", "1"), ("a.js", "2"), ("b.js", "2"), ("b.js", "")):
        (tmp_path / name).write_text(content)
        versions.append(read_site().version)
    assert len(set(versions)) == 4


def test_gateway_elsewhere_has_the_files(tmp_path: Path) -> None:
    """The folder of `daybook gateway-config` has all files that its gateway serves, wherever Envoy is started."""
    ports = Ports.free()
    settings = Settings(gateway_host="127.0.0.1", gateway_port=ports.gateway, gateway_admin_port=ports.admin)
    write_deployment(settings, tmp_path / "gateway", [("127.0.0.1", NO_SERVER)])
    command = [envoy_path(), "--config-path", str(tmp_path / "gateway" / "envoy.yaml"), "--disable-hot-restart"]
    (tmp_path / "elsewhere").mkdir()
    with subprocess.Popen([*command, "--log-level", "error"], cwd=tmp_path / "elsewhere") as process:
        try:
            wait_until(lambda: _answers(f"http://127.0.0.1:{ports.gateway}"), "the gateway answers")
            for name in FILES:
                answer = send(f"http://127.0.0.1:{ports.gateway}", f"/{name}")
                assert (answer.status, answer.body) == (200, (tmp_path / "gateway" / "site" / name).read_bytes())
        finally:
            process.terminate()
            process.wait(SECONDS_MAX)


def _answers(origin: str) -> bool:
    try:
        return send(origin, "/healthz").status == 200
    except OSError:
        return False


def test_committed_configuration_names_the_folder() -> None:
    """The envoy.yaml of the project's root names the folder by its path from there."""
    assert (ROOT / committed().site).samefile(SITE)
    assert not Path(committed().site).is_absolute()
