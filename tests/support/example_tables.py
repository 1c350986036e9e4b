"""Tables of examples, and rows of cached latents."""

import numpy as np

from dit_video.core.shared_array import SharedStrings
from dit_video.data.captions import TokenizedCaptions
from dit_video.data.examples import ExampleTable
from dit_video.data.rows import RowSpec, load_rows
from dit_video.data.sources import LatentExamples, compute_latent_grids
from dit_video.tokens import Grid


def make_table(grids, text, *, names=None, **columns):
    """Return a table of examples of these sizes in tokens, or numbers of tokens, whose captions have such lengths."""
    grids = np.asarray(grids, np.int32)
    if grids.ndim == 1:
        grids = np.stack([grids, np.ones_like(grids), np.ones_like(grids)], axis=1)
    captions = TokenizedCaptions([("a" * int(length),) for length in text], lambda caption: np.zeros(len(caption)))
    names = SharedStrings(names or [f"example {number}" for number in range(len(grids))])
    return ExampleTable(names=names, grids=grids, captions=captions, **columns)


def open_latents(source, captions, *, shape, batch=1, patch=Grid(1, 2, 2), cost=None, columns=None, **options):
    """Open the rows of cached latents; `columns` are further ones of their table."""
    grids, names = compute_latent_grids(source, patch), SharedStrings(source.names)
    table = ExampleTable(names=names, grids=grids, captions=captions, **columns or {})
    spec = RowSpec(layout=shape, batch=batch, cost=cost)
    return load_rows(LatentExamples(source, table, patch=patch), spec, **{"seed": 0} | options)
