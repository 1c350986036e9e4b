"""Data: from clips on disk to batches of one shape.

`ingest` turns a folder of clips into a data set, `source` reads it, `sizes` gives every clip its training size, and
`windows` yields batches for the autoencoder. `latents` reads cached latents, `plan` packs examples into rows, and
`loader` yields batches of rows for the denoiser. `shapes` renders a synthetic data set to try all of it on.

Import the modules by name: this file imports nothing, so that no module pays for the dependencies of another.
"""
