"""Large made-up data: a tenant with as many transactions as one likes, to measure and to try things on.

The books are true: every row goes through the commands and the rules that a server posts
with, and `daybook verify` finds nothing. Only the database is reached another way
(`server/store/bulk.py`).
"""
