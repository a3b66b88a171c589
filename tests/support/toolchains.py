"""The toolchains of other languages on this machine. Tests of generated clients run only for these."""

from __future__ import annotations

import shutil

TOOLS = {
    "ghz": ("ghz",),
    "go": ("go",),
    "grpcurl": ("grpcurl",),
    "jq": ("curl", "jq"),
    "java": ("javac", "mvn"),
    "java-stubs": ("javac", "mvn", "protoc-gen-grpc-java"),
    "typescript": ("node", "npm"),
}
"""The programs that each toolchain needs, by its name."""
MISSING = {name for name, programs in TOOLS.items() if not all(shutil.which(program) for program in programs)}


def with_tools(*needs: str) -> bool:
    """Whether this machine has all of these toolchains."""
    return not MISSING.intersection(needs)
