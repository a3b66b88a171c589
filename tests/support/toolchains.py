"""Which toolchains of other languages this machine has: tests of generated clients run for those only."""

from __future__ import annotations

import shutil

TOOLS = {
    "ghz": ("ghz",),
    "go": ("go",),
    "grpcurl": ("grpcurl",),
    "java": ("javac", "mvn"),
    "java-stubs": ("javac", "mvn", "protoc-gen-grpc-java"),
    "typescript": ("node", "npm"),
}
"""By the name of a toolchain: the programs that it needs."""
MISSING = {name for name, programs in TOOLS.items() if not all(shutil.which(program) for program in programs)}


def with_tools(*needs: str) -> bool:
    """Whether this machine has all of these toolchains."""
    return not MISSING.intersection(needs)
