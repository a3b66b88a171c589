"""Demo data: a tenant for each documented API, with a story that its list tells.

The same in every run: times, uids and keys are fixed. The keys are printed for everybody
to read, so the data goes into an empty database only, and such a database is served on
loopback only.
"""
