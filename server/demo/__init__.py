"""Demo data: a tenant with a made-up history for each documented API.

The data is the same in every run: times, uids and keys are fixed. The keys are public, so the
data is loaded only into an empty database, and such a database is served only on loopback.
"""
