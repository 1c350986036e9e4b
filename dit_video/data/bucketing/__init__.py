"""Batches of clips of one size: one bucket for every size."""
