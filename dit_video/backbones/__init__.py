"""Denoiser architectures."""
