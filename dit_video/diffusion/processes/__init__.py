"""Diffusion processes: the noise schedule alpha(t), sigma(t) and all that follows from it."""
