"""Parts of `tools/gpu_benchmark.py`."""
