"""Observation of calls: metrics, traces and the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import structlog

from server.transport.call_metadata import Metadata, call_metadata

log = structlog.get_logger(__name__)

EndTrace: TypeAlias = Callable[[grpc.StatusCode, str], None]
"""Called at the end of a traced call with its status and the reason of a refusal."""
Measure: TypeAlias = Callable[[grpc.StatusCode, str, float], None]
"""Called at the end of each call of a method: its status, the reason of a refusal, and its duration in seconds."""
Trace: TypeAlias = Callable[[Metadata], EndTrace]
"""Called at the start of each call of a method."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Hooks that observe calls. Each is called once for every method, with its full name."""

    measuring: Callable[[str], Measure] | None = None
    tracing: Callable[[str], Trace] | None = None

    def of(self, method: str) -> MethodObserver:
        """The observer of one method."""
        return MethodObserver(
            method,
            self.measuring and self.measuring(method),
            self.tracing and self.tracing(method),
            log.is_enabled_for(logging.DEBUG),
        )


@dataclass(frozen=True, slots=True)
class MethodObserver:
    """Observes the calls of one method."""

    method: str
    measure: Measure | None
    trace: Trace | None
    is_logged: bool
    """Whether each call is logged."""

    def begin(self) -> EndTrace | None:
        """Starts the trace of the current call, if calls are traced."""
        return None if self.trace is None else self.trace(call_metadata.get())

    def end(self, code: grpc.StatusCode, reason: str, started: float, end_trace: EndTrace | None) -> None:
        """Reports a call that `started` at that time of `time.perf_counter`."""
        seconds = time.perf_counter() - started
        if self.measure is not None:
            self.measure(code, reason, seconds)
        if self.is_logged:
            log.debug("call finished", method=self.method, code=code.name, seconds=seconds)
        if end_trace is not None:
            end_trace(code, reason)
