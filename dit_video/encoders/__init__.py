"""Frozen encoders opened from folders: text, images, and clips to latents."""
