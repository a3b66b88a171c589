"""The files that the gateway serves: the page in the browser.

Each file of the folder `site` is served under its path in the folder, and `index.html` also under its folder's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SITE = Path(__file__).resolve().parent / "site"
CONTENT_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
}
"""The content type of each suffix."""
_INDEX = "index.html"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_POLICIES: dict[str, str] = {}
"""The Content-Security-Policy of the files in a folder of the site that need another one."""


@dataclass(frozen=True, slots=True)
class Files:
    """Files with the same Content-Security-Policy."""

    path: str
    """A regular expression of their paths."""
    policy: str


@dataclass(frozen=True, slots=True)
class Site:
    """All files that the gateway serves."""

    files: Sequence[Files]
    version: str
    """A hash of all files. As a page consists of several files, they have the same version."""


def read_site() -> Site:
    """Reads the folder of the files."""
    version = hashlib.sha256()
    paths: dict[str, list[str]] = {}
    for file in sorted(each for each in SITE.rglob("*") if each.is_file()):
        name = file.relative_to(SITE).as_posix()
        content = file.read_bytes()
        version.update(f"{name} {len(content)} ".encode() + content)
        spellings = paths.setdefault(_POLICIES.get(name.partition("/")[0], _POLICY), [])
        spellings.append(re.escape(f"/{name}"))
        if file.name == _INDEX:
            folder = re.escape(f"/{name.removesuffix(_INDEX)}".rstrip("/"))
            spellings.append(f"{folder}/?")
    return Site(
        files=[Files("|".join(spellings), policy) for policy, spellings in paths.items()],
        version=version.hexdigest()[:16],
    )
