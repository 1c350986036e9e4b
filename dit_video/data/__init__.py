"""Data: from clips on disk to batches of one shape.

`ingest` turns a folder of clips into a data set, `clips` reads it, `sizes` gives every clip its training size, and
`windows` yields batches for the autoencoder. `latents` writes and reads cached latents, `packing` plans which examples
share a row, and `rows` yields batches of rows for the denoiser, from one of the `sources`.

Import the modules by name: this file imports nothing, so that no module pays for the dependencies of another.
"""
