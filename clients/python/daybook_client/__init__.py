"""A client of Daybook."""
