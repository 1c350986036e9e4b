"""Rendered data sets whose truth is known."""
