"""Kandinsky's MoVQ autoencoders and their relatives, as diffusers' `VQModel`."""
