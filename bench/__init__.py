"""Measures the speed and memory of Daybook on this machine; bench/README.md describes the method and the figures."""
