"""The HTTP face of the engine, by topic: bodies, answers, adapters, keys and limits, logs and metrics."""
