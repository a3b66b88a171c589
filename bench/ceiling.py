"""The ceiling: a grpc.aio server without interceptors or parsing, whose methods return constant bytes.

It has the garbage collector thresholds of Daybook's processes, so that neither side has an advantage.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from pathlib import Path
from typing import Any

import grpc

from server.cli import COLLECTOR_THRESHOLDS


class _SameAnswer(grpc.GenericRpcHandler):
    def __init__(self, answer: bytes) -> None:
        async def give(_request: bytes, _context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            return answer

        self._handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(give)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """Returns the same handler for every method."""
        return self._handler


async def serve(port: int, answer: bytes) -> None:
    """Serves until the process ends."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_SameAnswer(answer),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    """Serves the response that a file contains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answer", type=Path, required=True, help="file with the bytes to return")
    arguments = parser.parse_args()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    asyncio.run(serve(arguments.port, arguments.answer.read_bytes()))


if __name__ == "__main__":
    main()
