"""Helpers of the tests, and programs that they run in other processes."""
