"""Data: from clips on disk to batches of one shape.

`ingest` makes a data set of a folder of clips, `source` reads it, `sizes` gives every clip its training size, `windows`
makes batches for the autoencoder; `latents` holds what the autoencoder made, `plan` packs it into rows, and `loader`
yields batches of rows for the denoiser. `shapes` renders a data set to try all of it on.

Import the modules by name: this file imports nothing, so that one part doesn't pay for the other's dependencies.
"""
