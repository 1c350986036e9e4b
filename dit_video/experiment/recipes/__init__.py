"""Experiments built from a command line: fine-tuning and distillation."""
