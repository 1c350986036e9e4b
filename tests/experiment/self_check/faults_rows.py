"""Silent faults of rows and batches: tokens, segments, positions, texts, validity and order."""

import sys
import zlib

import numpy as np
from experiment.self_check.faults_injection import Catalogue, replace_function, replace_method

from dit_video.core import rng
from dit_video.data.examples import ExampleTable
from dit_video.data.latents.cache import KIND
from dit_video.data.packing.plan import RowPlanner
from dit_video.data.records import RecordPlace, get_file_name
from dit_video.data.rows import RowStream
from dit_video.data.tables import Table
from dit_video.models.conditioning import FrameConditioning
from dit_video.tokens import compute_positions, pack

FAULTS = Catalogue("rows")


def _change_rows(change):
    """Let `pack` return changed rows, as if its source had been edited."""
    original = pack

    def pack_wrongly(examples, *arguments, **options):
        row = original(examples, *arguments, **options)
        change(row, examples)
        return row

    replace_function(original, pack_wrongly)


@FAULTS.add(
    "The border between two clips of a row is one token late: the first token of a clip belongs to the one before.",
    "rows",
)
def segment_borders_late(run):
    def change(row, examples):
        before = row.segments[:-1].copy()
        row.segments[1:] = np.where(before > 0, before, row.segments[1:])

    _change_rows(change)


@FAULTS.add("Positions go on from clip to clip, as if a row were one clip.", *("rows", "positions"))
def positions_not_restarting(run):
    def change(row, examples):
        start = 0.0
        for segment in range(1, len(examples) + 1):
            is_member = row.segments == segment
            row.positions[is_member, 0] += start
            start = row.positions[is_member, 0].max() + 1

    _change_rows(change)


@FAULTS.add("Rows and columns are exchanged in the positions of tokens.", *("rows", "positions"))
def positions_transposed(run):
    original = compute_positions

    def compute_transposed(grid, **options):
        return np.ascontiguousarray(original(grid, **options)[:, [0, 2, 1]])

    replace_function(original, compute_transposed)


@FAULTS.add("Padding has the segment of the last clip, which attends to it.", *("rows", "padding"))
def padding_in_segment(run):
    def change(row, examples):
        row.segments[row.segments == 0] = len(examples)

    _change_rows(change)


@FAULTS.add(
    "The captions of the clips of a row are rotated: each clip has that of its neighbour.", *("captions", "rows")
)
def captions_rotated_in_row(run):
    original = pack

    def pack_rotated(examples, *arguments, **options):
        texts = [each.text for each in examples]
        examples = [each._replace(text=text) for each, text in zip(examples, texts[1:] + texts[:1], strict=True)]
        return original(examples, *arguments, **options)

    replace_function(original, pack_rotated)


@FAULTS.add("The iterator returns its first batch again and again.", "order")
def batch_repeated(run):
    def make(advance):
        def advance_once(self):
            if not hasattr(self, "first_batch"):
                self.first_batch = advance(self)
            return self.first_batch

        return advance_once

    replace_method(RowStream, "__next__", make)


class _Unshuffled:
    """A generator whose permutations are the identity."""

    def __init__(self, generator):
        self._generator = generator

    def permutation(self, values):
        return np.arange(values) if np.ndim(values) == 0 else np.array(values)

    def shuffle(self, values):
        pass

    def uniform(self, low=0.0, high=1.0, size=None):
        return np.full(size, (low + high) / 2)

    def __getattr__(self, name):
        return getattr(self._generator, name)


def _change_generator(change):
    make = rng.make_generator

    def make_changed(seed, purpose, *ids):
        return change(make, seed, ids) if purpose == "row plan" else make(seed, purpose, *ids)

    replace_function(make, make_changed)


@FAULTS.add("Rows come in the order of the data set: the shuffling is off.", "order")
def rows_not_shuffled(run):
    _change_generator(lambda make, seed, ids: _Unshuffled(make(seed, "row plan", *ids)))


@FAULTS.add("Each epoch has the order of the first: the epoch is not passed to the shuffling (`set_epoch`).", "order")
def epochs_alike(run):
    _change_generator(lambda make, seed, ids: make(seed, "row plan", 0, 0))


@FAULTS.add("A row holds its last clip twice, and its first one is never seen.", "order")
def example_twice_in_row(run):
    def make(get_row):
        def get_row_twice(self, number):
            examples, ranks = get_row(self, number)
            return np.array([examples[-1], *examples[1:]]), ranks  # the last one is the shortest, so that it fits

        return get_row_twice

    replace_method(RowPlanner, "get_row", make)


@FAULTS.add(
    "Half of the clips are left out of every epoch (clips dropped without a word: tdrussell/diffusion-pipe #113).",
    "order",
)
def clips_left_out(run):
    replace_method(RowPlanner, "_get_examples", lambda get: lambda self, epoch: get(self, epoch)[::2])


@FAULTS.add(
    "Tokens follow in another order than positions (patchify broken on main: modelscope/DiffSynth-Studio #1435).",
    "rows",
)
def tokens_in_wrong_order(run):
    sys.modules["dit_video.tokens.patchify"]._TOKEN_AXES = "... (t w h) (pt ph pw c)"


@FAULTS.add("The mask of known frames is inverted.", "frame_conditioning", variant="first frame")
def known_frames_inverted(run):
    def make(draw):
        return lambda self, layout, keys: ~draw(self, layout, keys) & (layout.segments > 0)

    replace_method(FrameConditioning, "draw_mask", make)


@FAULTS.add("Damaged clips, whose latents are zeros, count in the loss.", "rows")
def damaged_clips_counted(run):
    table = Table(run.folder / "latents", kind=KIND)
    for row in table.select("outcome == 'kept'")[:6].tolist():
        place = RecordPlace(*(table.read_values(name, [row])[0] for name in RecordPlace._fields))
        path = run.folder / "latents" / get_file_name(KIND, table.get_part(row))
        content = bytearray(path.read_bytes())
        content[place.offset + place.length // 2] ^= 0xFF
        path.write_bytes(content)
        assert zlib.crc32(content[place.offset :][: place.length]) != place.crc32

    def make(make_example):
        return lambda self, *arguments: make_example(self, *arguments)._replace(valid=True)

    replace_method(ExampleTable, "make_example", make)
