"""Evaluation of a model's outputs: reconstruction and prompt following."""
