"""A stand-in for curl: the flags that vendors' samples use, and nothing else.

A fresh machine need not have curl, and the package index has curl's library only, not the
program. This one is run by a shell like curl, so that quotes and continued lines are read as
a reader's shell reads them. It refuses any other flag.
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
    """Sends the request and prints the body of the answer."""
    parser = argparse.ArgumentParser(prog="curl", add_help=False, allow_abbrev=False)
    parser.add_argument("-X", "--request")
    parser.add_argument("-d", "--data")
    parser.add_argument("-H", "--header", action="append", default=[])
    parser.add_argument("-s", "--silent", action="store_true")
    parser.add_argument("-S", "--show-error", action="store_true")
    parser.add_argument("--cacert")
    parser.add_argument("--url")
    parser.add_argument("place", nargs="?")
    arguments = parser.parse_args()
    url = arguments.url or arguments.place or parser.error("no URL")
    if set(url) & set("[]{}"):
        parser.error("these characters are a pattern of URLs to curl")
    place = urlsplit(url)
    if place.scheme == "https":
        context = ssl.create_default_context(cafile=arguments.cacert)
        # curl trusts any certificate in --cacert, also one that is no authority.
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
    sys.stdout.buffer.write(connection.getresponse().read())


if __name__ == "__main__":
    main()
