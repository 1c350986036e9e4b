"""Training of a tiny denoiser on any mesh, for comparisons between meshes."""

import functools

import jax
import numpy as np
import optax

from dit_video.core import trees
from dit_video.diffusion import FlowMatching
from dit_video.distributed import (
    Parallelism,
    ShardingRules,
    make_partitioner,
    make_shardings,
    shard_batch,
)
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.nn import LoraConfig, get_graph_def, init_lora
from dit_video.planning import read_program
from dit_video.tokens import Grid, PackedBatch, PackedExample, PackedShape, compute_positions, pack, stack_rows
from dit_video.training.losses.auxiliary import AuxiliaryLoss, init_heads, make_terms
from dit_video.training.losses.denoiser import DenoiserLoss, LoraLoss
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from dit_video.training.step import JittedStep
from support.compilations import count_compilations
from support.random_params import make_random_params
from support.training_state import create_state, make_step

TEXT = ByteEncoderConfig(width=16, layers=1, heads=2, max_tokens=16)
DIT = DiTConfig(channels=1, context_width=16, patch=Grid(1, 2, 2), width=64, layers=2, heads=8, mlp_ratio=2.0)
WAN = WanDitConfig(channels=1, context_width=16, text_length=16, width=64, mlp_dim=96, layers=2, heads=8, time_width=16)
TOKENIZE = TEXT.make_tokenizer()
SHAPE = PackedShape(tokens=64, text=64, segments=4)
RULES = ShardingRules(min_size=1)
STEPS = 5
ROWS = 8


def make_rows(start: int) -> PackedBatch:
    """Make eight rows of 64 tokens: one segment, several with padding, or segments that span two devices."""
    grids = [Grid(2, 4, 6), Grid(1, 3, 4), Grid(3, 3, 3), Grid(2, 2, 5), Grid(4, 4, 4), Grid(1, 5, 5)]
    rows = [(0, 1), (2, 3), (4,), (5, 5, 1), (1, 2, 1), (), (3, 3, 1), (1, 0)]
    packed, number = [], start
    for row in rows:
        items = []
        for size in row:
            draw = np.random.default_rng(number)
            tokens = draw.normal(size=(grids[size].volume, 4)).astype(np.float32)
            items.append(PackedExample(tokens, compute_positions(grids[size]), TOKENIZE(f"clip {size}"), number))
            number += 1
        packed.append(pack(items, SHAPE, width=4))
    return stack_rows(packed)


def make_test_optimizer(name: str) -> optax.GradientTransformation:
    if name == "sgd":
        return optax.sgd(2e-3)
    return AdamW(learning_rate=1e-3, schedule=Constant(warmup=0)).make(steps=10)


def begin(
    parallel: Parallelism,
    backbone=DIT,
    *,
    optimizer: str,
    devices=None,
    lora: LoraConfig | None = None,
    auxiliary: tuple[AuxiliaryLoss, ...] = (),
):
    """Return a mesh, a state of random parameters on it, the step and its constants.

    The constants are the parameters if an adapter is trained.
    """
    partitioner = make_partitioner(parallel, devices)
    mesh = partitioner.mesh
    transformation = make_test_optimizer(optimizer)
    loss = DenoiserLoss(
        backbone=get_graph_def(backbone.make, partitioner),
        text_encoder=get_graph_def(TEXT.make),
        objective=FlowMatching(),
        caption_dropout=0.2,
        empty_caption=TOKENIZE(""),
        seed=3,
        auxiliary=make_terms(auxiliary, backbone, partitioner, steps=STEPS),
    )
    params = {"backbone": make_random_params(backbone.make), "text": make_random_params(TEXT.make)}
    params |= init_heads(auxiliary, backbone, jax.random.key(2))
    layout = functools.partial(make_shardings, mesh=mesh, rules=RULES)
    if lora is None:
        state = create_state(lambda key: params, transformation, jax.random.key(0), shardings=layout)
        return mesh, state, make_step(loss, transformation, ema_decay=0.9), ()
    state = create_state(
        lambda key: make_random_factors(params, lora), transformation, jax.random.key(0), shardings=layout
    )
    frozen = jax.device_put(params, layout(params))
    adapting = LoraLoss(loss=loss, scale=lora.scale)

    def step(state, batch, frozen):
        return make_step(adapting, transformation, ema_decay=0.9, constants=(frozen,))(state, batch)

    return mesh, state, jax.jit(step), (frozen,)


def make_random_factors(params, lora: LoraConfig):
    """Make an adapter whose second factors are not zero."""
    factors = init_lora(params, lora, jax.random.key(1))
    return jax.tree.map(lambda leaf: 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), factors)


def read_collectives(parallel: Parallelism, backbone, *, lora: LoraConfig | None = None):
    """Return the collectives of a step that is compiled with the layout of TPUs, and the number of its parameters."""
    jax.default_backend = lambda: "tpu"
    mesh, state, step, frozen = begin(parallel, backbone, optimizer="adamw", lora=lora)
    program, constants = (step.get_program(state), ((),)) if isinstance(step, JittedStep) else (step, frozen)
    compiled = program.lower(state, shard_batch(make_rows(0), mesh), *constants).compile()
    return read_program(compiled.as_text(), dict(mesh.shape)).collectives, trees.count_values((state.params, frozen))


def train(parallel: Parallelism, backbone=DIT, *, steps: int = STEPS, **options):
    """Train for some steps from random parameters; the options are those of `begin`.

    Returns:
      The losses and gradient norms, the parameters after the last step, and the number of arrays that are split.
    """
    mesh, state, step, frozen = begin(parallel, backbone, **options)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    metrics, compiled = [], None
    for number in range(steps):
        state, values = step(state, shard_batch(make_rows(20 * number), mesh), *frozen)
        assert compiled in (None, count_compilations()), "a later step was compiled again"
        compiled = count_compilations()
        metrics.append([float(values["loss"]), float(values["gradient_norm"])])
    gathered = {path: gather(leaf) for path, leaf in trees.flatten(state.params).items()}
    return np.asarray(metrics), gathered, split


def gather(leaf) -> np.ndarray:
    """Return the global array, on every process."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    replicated = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated)(leaf).addressable_data(0))


def assert_runs_are_equal(actual, expected, *, optimizer: str) -> None:
    """Assert that losses are equal to 1e-6, gradient norms to 5e-6, and parameters under SGD, too.

    Adam amplifies the rounding of a gradient that is zero in exact arithmetic, such as that of a key's bias.
    """
    np.testing.assert_allclose(actual[0][:, 0], expected[0][:, 0], rtol=1e-6)
    np.testing.assert_allclose(actual[0][:, 1], expected[0][:, 1], rtol=5e-6)
    if optimizer != "sgd":
        return
    for path, leaf in actual[1].items():
        assert np.abs(leaf - expected[1][path]).max() <= 1e-6 * max(np.abs(expected[1][path]).max(), 1), path
