"""Curation of data sets: screening while they are ingested, annotators that add columns, exports, and raters.

Import the modules by name: this file imports nothing, so that processes of an ingest start without JAX.
"""
