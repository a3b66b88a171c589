"""Imports of history from another system: read rows, sort them, plan opening balances, post.

A reader in `readers/` turns the JSON pages of one vendor into rows; `table.py` does the same for a CSV file.
"""
