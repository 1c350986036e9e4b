"""Solvers of the reverse process, one family a file."""
