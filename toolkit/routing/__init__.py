"""Routing: choose the composition for each request."""
