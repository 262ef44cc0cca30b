"""Processes: the supervisor and its workers, the embedded PostgreSQL, migrations, what is checked before a start."""
