"""A replacement for curl with only the flags that the documentation and vendors' samples use.

A machine may lack curl, and the package index has only curl's library. A shell runs this program like curl, so quotes
and line continuations have their usual meaning. It rejects any other flag.
"""

from __future__ import annotations

import argparse
import http.client
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit


def install(folder: Path) -> None:
    """Puts a command `curl` into a folder."""
    command = folder / "curl"
    command.write_text(f"""#!/bin/sh\nexec '{sys.executable}' '{__file__}' "$@"\n""")
    command.chmod(0o755)


def main() -> None:
    """Sends the request and prints the body of the response."""
    parser = argparse.ArgumentParser(prog="curl", add_help=False, allow_abbrev=False)
    parser.add_argument("-X", "--request")
    parser.add_argument("-d", "--data")
    parser.add_argument("-H", "--header", action="append", default=[])
    parser.add_argument("-f", "--fail", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("-s", "--silent", action="store_true")
    parser.add_argument("-S", "--show-error", action="store_true")
    parser.add_argument("--cacert")
    parser.add_argument("--url")
    parser.add_argument("place", nargs="?")
    arguments = parser.parse_args()
    url = arguments.url or arguments.place or parser.error("no URL")
    if set(url) & set("[]{}"):
        parser.error("curl interprets these characters as a URL pattern")
    place = urlsplit(url)
    if place.scheme == "https":
        context = ssl.create_default_context(cafile=arguments.cacert)
        # curl trusts any certificate in --cacert, even if it is not an authority's.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(place.netloc, context=context)
    else:
        assert place.scheme == "http"
        connection = http.client.HTTPConnection(place.netloc)
    body = None if arguments.data is None else arguments.data.encode()
    connection.putrequest(
        arguments.request or ("GET" if body is None else "POST"),
        f"{place.path}?{place.query}",
        skip_accept_encoding=True,
    )
    for header in ("User-Agent: curl/8.0.0", "Accept: */*", *arguments.header):
        name, _, value = header.partition(":")
        connection.putheader(name, value.strip())
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    if arguments.fail and answer.status >= 400:
        sys.exit(22)
    if arguments.output:
        arguments.output.write_bytes(content)
    else:
        sys.stdout.buffer.write(content)


if __name__ == "__main__":
    main()
