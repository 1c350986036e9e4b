"""Logging, throughput, profiles and records of skipped steps."""
