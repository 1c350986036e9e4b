"""Metrics of samples of rendered shapes and scenes."""
