"""Nebula Block's errors: `{data: null, message, status: "failed"}`."""

from server.vendors.vendor import Vendor

VENDOR = Vendor(
    name="Nebula Block",
    service="daybook.facades.nebulablock.v1.Users",
    path="(api/v1/)?users",
    render=lambda _status, message, _word: {"data": None, "message": message, "status": "failed"},
)
