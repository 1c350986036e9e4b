"""Stable Diffusion's autoencoder, as diffusers' `AutoencoderKL`."""
