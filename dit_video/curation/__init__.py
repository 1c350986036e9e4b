"""Curation of data sets: annotators that add columns to the table of clips."""
