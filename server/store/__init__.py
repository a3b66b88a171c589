"""All SQL: tables, engines, reads, posting, migrations."""
