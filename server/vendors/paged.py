"""The errors of Daybook's own page-number API: `{detail}`."""

from server.vendors.vendor import Vendor

VENDOR = Vendor(
    name="Paged",
    service="daybook.facades.paged.v1.Statements",
    path="api/billing",
    render=lambda _status, message, _word: {"detail": message},
    # The links of an answer begin with the origin that the caller used.
    headers={"x-daybook-origin": "%REQ(X-FORWARDED-PROTO)%://%REQ(:AUTHORITY)%"},
)
