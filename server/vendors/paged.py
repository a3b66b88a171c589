"""The errors of Daybook's own page-number API: `{detail}`."""

from server.vendors.vendor import Vendor

VENDOR = Vendor(
    name="Paged",
    service="daybook.facades.paged.v1.Statements",
    path="api/billing",
    render=lambda _status, message, _word: {"detail": message},
    # Links in responses begin with the origin of the request.
    headers={"x-daybook-origin": "%REQ(X-FORWARDED-PROTO)%://%REQ(:AUTHORITY)%"},
)
