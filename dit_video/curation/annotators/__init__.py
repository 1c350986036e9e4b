"""Annotators, one a file."""
