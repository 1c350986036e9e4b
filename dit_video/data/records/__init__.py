"""TFDS data sets in ArrayRecord files."""
