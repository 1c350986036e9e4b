"""Settings of the machine: XLA flags, huge pages, the compilation cache, provenance of the code."""
