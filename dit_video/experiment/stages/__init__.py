"""Stages of an experiment, one a file."""
