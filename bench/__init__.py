"""Measures Daybook on this machine; bench/README.md says what and how."""
