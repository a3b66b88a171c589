"""Generates gen/ from the contracts in this folder and the internal messages in server/protos.

Also copies the imported contracts of Google into googleapis/, so that protoc, buf and other tools need only this
folder. `make gen` runs it as `python protos/generate.py`. Exits with an error if a change would break clients of the
committed contracts, unless `--allow-breaking` is given. tests/test_conventions.py runs it into an empty folder to
prove that the committed files are up to date.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PROTOS = Path(__file__).resolve().parent
# Messages that only the server uses; clients don't generate code for them.
INTERNAL_PROTOS = PROTOS.parent / "server" / "protos"
GEN = PROTOS.parent / "gen"
DESCRIPTORS = "descriptors.binpb"

GOOGLE_PROTOS = PROTOS / "googleapis"
# No contract imports these types, but Envoy needs all types in google.rpc.Status.details: otherwise it translates an
# error into an empty body.
ERROR_DETAIL_TYPES = ("google/rpc/error_details.proto", "google/rpc/status.proto")
HTTP_BODY = "google.api.HttpBody"
"""The type of a response_body with which Envoy starts: a file in a format of its own."""
IMPORTED_TYPES = (
    "google/api/annotations.proto",
    "google/api/client.proto",
    "google/api/field_behavior.proto",
    "google/api/http.proto",
    "google/api/httpbody.proto",
    "google/api/launch_stage.proto",
    "google/api/resource.proto",
)


def files_in(folder: Path) -> list[str]:
    """Returns the paths of Daybook's proto files under a folder, relative to it and sorted."""
    return sorted(str(path.relative_to(folder)) for path in (folder / "daybook").rglob("*.proto"))


def google_types() -> dict[str, bytes]:
    """Returns the content of each file in googleapis/ by its path there."""
    package = distribution("googleapis-common-protos")
    return {name: Path(str(package.locate_file(name))).read_bytes() for name in (*IMPORTED_TYPES, *ERROR_DETAIL_TYPES)}


def run_protoc(*arguments: str) -> None:
    """Runs the protoc of grpcio-tools. Raises CalledProcessError if it fails."""
    well_known_types = distribution("grpcio-tools").locate_file("grpc_tools/_proto")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            *(f"-I{folder}" for folder in (PROTOS, GOOGLE_PROTOS, INTERNAL_PROTOS, well_known_types)),
            *arguments,
        ],
        check=True,
        # The plugins of mypy-protobuf are in the interpreter's folder.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )


def write_descriptors(path: Path, *, source_info: bool = False) -> None:
    """Writes the contracts and their imports as a FileDescriptorSet.

    source_info adds the comments, which buf needs and Envoy does not.
    """
    run_protoc(
        f"--descriptor_set_out={path}",
        "--include_imports",
        *(["--include_source_info"] if source_info else []),
        *files_in(PROTOS),
        *ERROR_DETAIL_TYPES,
    )


def generate(out: Path) -> None:
    """Writes messages, stubs, type stubs and the descriptor set into the empty folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    run_protoc(
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet,only_async:{out}",
        *files_in(PROTOS),
        *files_in(INTERNAL_PROTOS),
    )
    for folder in (PROTOS, INTERNAL_PROTOS):
        for file in files_in(folder):
            if "\nservice " in (folder / file).read_text():
                continue
            # grpcio-tools writes an empty module for a file without a service.
            for ending in (".py", ".pyi"):
                (out / file.replace(".proto", f"_pb2_grpc{ending}")).unlink(missing_ok=True)
    # Type checkers ignore the .pyi files of an installed package without it.
    (out / "daybook" / "v1" / "py.typed").touch()
    write_descriptors(out / DESCRIPTORS)
    (out / DESCRIPTORS).write_bytes(without_response_bodies((out / DESCRIPTORS).read_bytes()))


def without_response_bodies(descriptors: bytes) -> bytes:
    """Removes each response_body but HttpBody, with which Envoy does not start; its Lua filter unwraps the body."""
    # A separate pool has the same extensions in every process, so the bytes are reproducible.
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(descriptors).file:
        pool.AddSerializedFile(file.SerializeToString())
    read: Any = GetMessageClass(pool.FindMessageTypeByName("google.protobuf.FileDescriptorSet")).FromString(descriptors)
    path = pool.FindExtensionByName("google.api.http")
    for method in (method for file in read.file for service in file.service for method in service.method):
        if method.options.HasExtension(path):
            answer = pool.FindMessageTypeByName(method.output_type.lstrip("."))
            rule = method.options.Extensions[path]
            for binding in (rule, *rule.additional_bindings):
                body = answer.fields_by_name.get(binding.response_body)
                if body is not None and (not body.message_type or body.message_type.full_name != HTTP_BODY):
                    binding.ClearField("response_body")
    written: bytes = read.SerializeToString(deterministic=True)
    return written


def buf(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs buf, which prints its findings to stdout, one per line."""
    return subprocess.run(
        [str(Path(sys.executable).parent / "buf"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def breaking_changes(new: Path, old: Path) -> str:
    """Returns the changes from the descriptor set `old` to `new` that break clients; empty if there are none."""
    rules = str(PROTOS / "buf.yaml")
    result = buf("breaking", str(new), "--against", str(old), "--config", rules, "--against-config", rules)
    return result.stdout + result.stderr


def main() -> None:
    """Regenerates gen/, unless that would break clients."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--allow-breaking", action="store_true", help="accept a change that breaks clients")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in google_types().items():
            (GOOGLE_PROTOS / name).parent.mkdir(parents=True, exist_ok=True)
            (GOOGLE_PROTOS / name).write_bytes(content)
        fresh = Path(folder) / "gen"
        generate(fresh)
        committed = GEN / DESCRIPTORS
        if committed.exists() and not arguments.allow_breaking:
            found = breaking_changes(fresh / DESCRIPTORS, committed)
            if found:
                sys.exit(f"{found}This breaks clients. To do it anyway, use --allow-breaking")
        shutil.rmtree(GEN, ignore_errors=True)
        shutil.copytree(fresh, GEN)


if __name__ == "__main__":
    main()
