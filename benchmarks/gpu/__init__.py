"""The Triton kernels on a GPU, beside FLA, torch and what else is there: `python -m benchmarks.gpu`."""
