"""Losses, one model a file."""
