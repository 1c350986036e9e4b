"""Measures of decoded frames, shot boundaries among them, and near-duplicates by their hashes."""
