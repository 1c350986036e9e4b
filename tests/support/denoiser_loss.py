"""The loss of a tiny denoiser with a byte encoder, and packed rows of three clips."""

import numpy as np

from dit_video.diffusion import FlowMatching
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedBatch, PackedExample, PackedShape, compute_positions, pack, stack_rows
from dit_video.training.losses.denoiser import DenoiserLoss
from support.random_params import make_random_params

TEXT = ByteEncoderConfig(width=8, layers=1, heads=1, max_tokens=16)
DIT = DiTConfig(channels=1, context_width=8, patch=Grid(1, 2, 2), width=12, layers=1, heads=1, mlp_ratio=2.0)
TOKENIZE = TEXT.make_tokenizer()
SHAPE = PackedShape(tokens=20, text=28, segments=3)
LOSS = DenoiserLoss(
    backbone=get_graph_def(DIT.make),
    text_encoder=get_graph_def(TEXT.make),
    objective=FlowMatching(),
    caption_dropout=0.5,
    empty_caption=TOKENIZE(""),
    seed=3,
)
PARAMS = {"backbone": make_random_params(DIT.make), "text": make_random_params(TEXT.make)}


def make_example(grid: Grid, caption: str, example: int) -> PackedExample:
    """Make a clip of random tokens with its caption."""
    tokens = np.random.default_rng(example).normal(size=(grid.volume, 4)).astype(np.float32)
    return PackedExample(tokens, compute_positions(grid), TOKENIZE(caption), example)


A, B, C = (
    make_example(Grid(2, 2, 2), "red ball", 5),
    make_example(Grid(1, 2, 3), "box", 6),
    make_example(Grid(1, 1, 4), "a dot", 2**32 - 1),
)


def make_batch(*rows: list[PackedExample]) -> PackedBatch:
    """Pack each list of clips into a row."""
    return stack_rows([pack(row, SHAPE, width=4) for row in rows])


def make_rows(start: int) -> PackedBatch:
    """Make eight rows of 13 clips, whose numbers begin at `start`."""
    clips = [(A, B, C)[index % 3]._replace(example=start + index) for index in range(13)]
    return make_batch(clips[:2], clips[2:4], clips[4:5], [], clips[5:8], clips[8:9], clips[9:11], clips[11:13])
