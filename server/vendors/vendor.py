"""What a table of a vendor holds."""

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
"""The message for each status, unless the error has a better one."""

MALFORMED = "A parameter is malformed or given more than once"
"""The message for a request that the gateway can't translate."""

RenderBody = Callable[[int, str, str], Mapping[str, object]]
"""Makes an error's body, a JSON object, of its HTTP status, its message and the vendor's word for the status."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as one vendor's clients know it."""

    status: int
    """The HTTP status."""
    body: Mapping[str, object]
    """Printed as JSON."""


@dataclass(frozen=True, slots=True)
class Vendor:
    """The errors of a documented API, and what the gateway must know of it."""

    name: str
    service: str
    """The full name of the facade's service."""
    path: str
    """A regular expression of the first segments of each of its paths, without the first slash."""
    render: RenderBody
    words: Mapping[int, str] = field(default_factory=dict)
    """The vendor's word for each status that it documents; empty if its errors have no such word."""
    statuses: Mapping[int, int] = field(default_factory=dict)
    """The status that the vendor documents, for one that it doesn't."""
    not_found: str = MESSAGES[404]
    """The message for a path that doesn't exist; may hold command operators of Envoy."""
    malformed: str = MALFORMED
    """The message for a request that the gateway can't translate."""
    malformed_status: int = 400
    malformed_more: Mapping[str, object] = field(default_factory=dict)
    """Further members of the body for such a request."""
    challenge: str = "Bearer"
    """The www-authenticate header of a 401."""
    arrays: Mapping[str, str] = field(default_factory=dict)
    """The field that is the whole answer, by a regular expression of the path: for answers that are a JSON array."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers that the gateway adds to a request, with command operators of Envoy in their values."""

    def refuse(self, status: int, message: str, **more: object) -> Refusal:
        """An error in the vendor's words. `more` are further members of the body."""
        shown = self.statuses.get(status, status)
        return Refusal(shown, {**self.render(shown, message, self.words[shown] if self.words else ""), **more})

    def gateway_refusals(self) -> Mapping[int, Refusal]:
        """What the gateway answers by itself, by the HTTP status that Envoy would give; the first that fits counts.

        400 stands for every other 4xx, 503 for 502 and above, and 500 for the rest.
        """
        malformed = self.refuse(self.malformed_status, self.malformed, **self.malformed_more)
        return {
            404: self.refuse(404, self.not_found),
            **{status: self.refuse(status, MESSAGES[status]) for status in (408, 413, 429)},
            400: malformed,
            **{status: self.refuse(status, MESSAGES[status]) for status in (504, 503, 500)},
        }
