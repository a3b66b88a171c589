"""The type of a vendor's table of errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MESSAGES: Mapping[int, str] = {
    404: "Not found",
    408: "The request took too long to arrive",
    413: "Payload Too Large",
    429: "Too many requests",
    500: "Internal server error",
    503: "The service is unavailable",
    504: "The request took too long",
}
"""The default message for each status."""

MALFORMED = "A parameter is malformed or given more than once"
"""The message for a request that the gateway can't translate."""

RenderBody = Callable[[int, str, str], Mapping[str, object]]
"""Renders an error's body, a JSON object, from the HTTP status, the message and the vendor's word for the status."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error in a vendor's format."""

    status: int
    """The HTTP status."""
    body: Mapping[str, object]
    """The JSON object of the body."""


@dataclass(frozen=True, slots=True)
class Vendor:
    """The errors of a documented API, and the facts that the gateway needs."""

    name: str
    service: str
    """The full name of the facade's service."""
    path: str
    """A regular expression for the beginning of the API's paths, without the first slash."""
    render: RenderBody
    words: Mapping[int, str] = field(default_factory=dict)
    """The vendor's word for each status that it documents; empty if its errors have no such word."""
    statuses: Mapping[int, int] = field(default_factory=dict)
    """The documented status to use for each undocumented one."""
    not_found: str = MESSAGES[404]
    """The message for a path that doesn't exist; may contain Envoy's command operators."""
    malformed: str = MALFORMED
    """The message for a request that the gateway can't translate."""
    malformed_status: int = 400
    malformed_more: Mapping[str, object] = field(default_factory=dict)
    """Further members of the body for such a request."""
    challenge: str = "Bearer"
    """The www-authenticate header of a 401."""
    arrays: Mapping[str, str] = field(default_factory=dict)
    """For responses that are a JSON array: the field with the array, by a regular expression of the path."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers that the gateway adds to requests; values may contain Envoy's command operators."""

    def refuse(self, status: int, message: str, **more: object) -> Refusal:
        """Renders an error in the vendor's format. `more` are further members of the body."""
        shown = self.statuses.get(status, status)
        return Refusal(shown, {**self.render(shown, message, self.words[shown] if self.words else ""), **more})

    def gateway_refusals(self) -> Mapping[int, Refusal]:
        """The gateway's own errors, by Envoy's HTTP status. The first match applies.

        400 matches every other 4xx, 503 matches 502 and above, and 500 matches the rest.
        """
        malformed = self.refuse(self.malformed_status, self.malformed, **self.malformed_more)
        return {
            404: self.refuse(404, self.not_found),
            **{status: self.refuse(status, MESSAGES[status]) for status in (408, 413, 429)},
            400: malformed,
            **{status: self.refuse(status, MESSAGES[status]) for status in (504, 503, 500)},
        }
