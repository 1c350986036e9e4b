"""Foundations without dependencies on models: types, random keys, trees, errors, files, storage, configs, pixels."""
