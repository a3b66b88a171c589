"""Generates large data for tests and measurements: a tenant with any number of transactions.

The books are consistent: every row is made by the commands and rules of posting, and
`daybook verify` finds nothing. Only the writing differs: see `server/store/bulk.py`.
"""
