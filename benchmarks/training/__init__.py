"""What training costs: `python -m benchmarks.training speed|packing|longest|memory`; see benchmarks/README.md."""
