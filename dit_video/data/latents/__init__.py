"""Cached latents: their files, and the encoding that fills them, ahead of training or during it."""
