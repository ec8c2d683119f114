"""Measurements against the peers of the field, each a command that prints its table; see benchmarks/README.md."""
