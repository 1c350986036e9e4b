"""Ingest of a source of clips into a data set: listing (the docstring of `formats` has a table), inspection, engine.

Import the modules by name: this file imports nothing, so that worker processes start without TFDS and JAX.
"""
