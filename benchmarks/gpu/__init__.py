"""The kernels on a GPU against what bounds them: `python -m benchmarks.gpu`."""
