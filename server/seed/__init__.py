"""Generates large data for tests and measurements: a tenant with any number of transactions.

The books are consistent: the commands and rules of posting create every row, and `daybook
verify` finds no divergence. Only the writing differs: see `server/store/bulk.py`.
"""
