"""The metadata of the current call, for code without a gRPC context."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TypeAlias

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

call_metadata: ContextVar[Metadata] = ContextVar("call_metadata", default=())
"""Set by server.transport.calls before a servicer runs; empty outside of a call."""
