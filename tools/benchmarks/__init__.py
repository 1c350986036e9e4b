"""What `tools/benchmark.py` measures: settings, training steps, data."""
