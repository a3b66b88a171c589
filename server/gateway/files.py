"""The files that the gateway serves: the page in the browser, and the reference with its OpenAPI documents.

Each file of the folder `site` is served under its path in the folder, and `index.html` also under its folder's. The
reference shows the documents with Swagger UI, whose files are those of the package swagger_ui_bundle.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swagger_ui_bundle import swagger_ui_path

SITE = Path(__file__).resolve().parent / "site"
SWAGGER_UI = Path(swagger_ui_path)
"""The folder of the package's files."""
SWAGGER_UI_PATH = "docs/swagger-ui"
"""The path at which they are served."""
_SWAGGER_UI_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
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
_POLICIES = {
    # Swagger UI has icons in its style sheet.
    "docs": _POLICY.replace("img-src 'self'", "img-src 'self' data:"),
}
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


def site_files() -> Mapping[str, Path]:
    """Returns every file by its path at the gateway, without the first slash."""
    own = sorted(each for each in SITE.rglob("*") if each.is_file())
    return {
        **{file.relative_to(SITE).as_posix(): file for file in own},
        **{f"{SWAGGER_UI_PATH}/{name}": SWAGGER_UI / name for name in _SWAGGER_UI_FILES},
    }


def copy_site(folder: Path) -> None:
    """Copies every file into a folder, without its permissions, so that another user's gateway can read it."""
    for name, file in site_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def read_site() -> Site:
    """Reads the files."""
    version = hashlib.sha256()
    paths: dict[str, list[str]] = {}
    for name, file in site_files().items():
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
