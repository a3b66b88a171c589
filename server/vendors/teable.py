"""Teable's errors: `{message, status, code}`."""

from server.vendors.vendor import MALFORMED, Vendor

VENDOR = Vendor(
    name="Teable",
    service="daybook.facades.teable.v1.Billing",
    path="(api/)?space",
    render=lambda status, message, word: {"message": message, "status": status, "code": word},
    words={
        400: "validation_error",
        401: "unauthorized",
        403: "restricted_resource",
        404: "not_found",
        408: "request_timeout",
        409: "conflict",
        429: "too_many_requests",
        500: "internal_server_error",
        503: "database_connection_unavailable",
        504: "gateway_timeout",
    },
    statuses={413: 400},
    not_found="Cannot %REQ(:METHOD)% %PATH(NQ)%",
    malformed=f"Validation error: {MALFORMED}",
)
