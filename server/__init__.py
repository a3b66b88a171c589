"""Daybook: a credit ledger as a service. docs/architecture.md shows the rooms."""
