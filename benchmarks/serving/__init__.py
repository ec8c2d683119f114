"""Serving many adapters of one base against PEFT, transformers and vLLM: `python -m benchmarks.serving`."""
