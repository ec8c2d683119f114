"""Serving: run many compositions of one base in one batch."""
