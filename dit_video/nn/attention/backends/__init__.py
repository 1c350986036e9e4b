"""Implementations of attention, each equal to the dense masked reference."""
