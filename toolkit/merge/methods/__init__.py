"""Merge methods, one per file; `toolkit.merge.method` says what a file declares."""
