"""Dreadnode's errors: `{code, detail, type}`, with `errors` for invalid parameters."""

from server.vendors.vendor import MALFORMED, Vendor

VENDOR = Vendor(
    name="Dreadnode",
    service="daybook.facades.dreadnode.v1.Credits",
    path="api/(v1/)?org",
    render=lambda status, message, word: {"code": status, "detail": message, "type": word},
    words={
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        409: "already_exists_error",
        422: "validation_error",
        429: "rate_limit_error",
        500: "app_error",
        502: "bad_gateway_error",
        504: "gateway_timeout_error",
    },
    # Dreadnode documents no 503; 502 is the nearest.
    statuses={408: 400, 413: 400, 503: 502},
    malformed="Validation failed",
    malformed_status=422,
    malformed_more={"errors": [{"loc": ["query"], "msg": MALFORMED, "type": "value_error"}]},
    arrays={"/api/(v1/)?org/[^/]+/credits/transactions/?": "transactions"},
)
