"""Spacebring's errors: `{message, type}`."""

from server.vendors.vendor import Vendor

VENDOR = Vendor(
    name="Spacebring",
    service="daybook.facades.spacebring.v1.Transactions",
    path="transactions",
    render=lambda _status, message, word: {"message": message, "type": word},
    words={
        400: "invalidParams",
        401: "unauthorized",
        403: "forbidden",
        404: "notFound",
        429: "tooManyRequests",
        500: "internalError",
        503: "internalError",
        504: "internalError",
    },
    statuses={408: 400, 413: 400},
    challenge='Bearer, Basic realm="Spacebring", charset="UTF-8"',
)
