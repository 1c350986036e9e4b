"""Evaluation by protocols: what is sampled, the folder of samples, metrics, and comparisons."""
