"""Measures Daybook on the machine at hand; bench/README.md says what and why."""
