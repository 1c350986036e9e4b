"""A tiny denoiser's training on any mesh: what the tests of meshes compare."""

import functools

import jax
import numpy as np
import optax

from dit_video.backbones.dit import DitConfig
from dit_video.backbones.wan import WanDitConfig
from dit_video.core import trees as trees
from dit_video.diffusion import FlowMatching
from dit_video.distributed import MeshConfig, ShardingRules, make_mesh, make_shardings, shard_batch, shard_model
from dit_video.distributed.planner import read_program
from dit_video.nn import LoraConfig, get_graph_def, init_lora
from dit_video.text import ByteEncoderConfig
from dit_video.tokens import Grid, PackedBatch, PackedExample, PackedShape, compute_positions, pack
from dit_video.training.losses.denoiser import DenoiserLoss
from dit_video.training.losses.lora import LoraLoss
from dit_video.training.optim.optimizer import OptimizerConfig, make_optimizer
from dit_video.training.state import create_state
from dit_video.training.step import make_step
from support.rough import rough_params

TEXT = ByteEncoderConfig(width=16, layers=1, heads=2, max_tokens=16)
DIT = DitConfig(channels=1, context_width=16, patch=Grid(1, 2, 2), width=64, layers=2, heads=8, mlp_ratio=2.0)
WAN = WanDitConfig(channels=1, context_width=16, text_length=16, width=64, mlp_dim=96, layers=2, heads=8, time_width=16)
TOKENIZE = TEXT.make_tokenizer()
SHAPE = PackedShape(tokens=64, text=64, segments=4)
RULES = ShardingRules(min_size=1)
STEPS = 5
ROWS = 8


def packed(start: int) -> PackedBatch:
    """Eight rows of 64 tokens: of one segment, of several with padding, and with segments that lie on two devices."""
    of = [Grid(2, 4, 6), Grid(1, 3, 4), Grid(3, 3, 3), Grid(2, 2, 5), Grid(4, 4, 4), Grid(1, 5, 5)]
    rows = [(0, 1), (2, 3), (4,), (5, 5, 1), (1, 2, 1), (), (3, 3, 1), (1, 0)]
    made, number = [], start
    for row in rows:
        items = []
        for size in row:
            draw = np.random.default_rng(number)
            tokens = draw.normal(size=(of[size].volume, 4)).astype(np.float32)
            items.append(PackedExample(tokens, compute_positions(of[size]), TOKENIZE(f"clip {size}"), number))
            number += 1
        made.append(pack(items, SHAPE, width=4))
    return PackedBatch(*map(np.stack, zip(*made, strict=True)))


def optimizer_of(name: str) -> optax.GradientTransformation:
    if name == "sgd":
        return optax.sgd(2e-3)
    return make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup=0), steps=10)


def begin(mesh_config: MeshConfig, dit=DIT, *, optimizer: str, devices=None, lora: LoraConfig | None = None):
    """The mesh, a state of rough parameters on it, the step, and its constants: the parameters, where an adapter is
    trained."""
    mesh = make_mesh(mesh_config, devices)
    chosen = optimizer_of(optimizer)
    loss = DenoiserLoss(
        dit=get_graph_def(shard_model(dit.make, mesh, mesh_config.context_attention)),
        text=get_graph_def(TEXT.make),
        objective=FlowMatching(),
        caption_dropout=0.2,
        empty_caption=TOKENIZE(""),
        seed=3,
    )
    params = {"dit": rough_params(dit.make), "text": rough_params(TEXT.make)}
    layout = functools.partial(make_shardings, mesh=mesh, rules=RULES)
    if lora is None:
        state = create_state(lambda key: params, chosen, jax.random.key(0), shardings=layout)
        return mesh, state, make_step(loss, chosen, ema_decay=0.9), ()
    state = create_state(lambda key: rough_factors(params, lora), chosen, jax.random.key(0), shardings=layout)
    frozen = jax.device_put(params, layout(params))
    adapting = LoraLoss(loss=loss, scale=lora.scale)

    def step(state, batch, frozen):
        return make_step(adapting, chosen, ema_decay=0.9, constants=(frozen,))(state, batch)

    return mesh, state, jax.jit(step), (frozen,)


def rough_factors(params, lora: LoraConfig):
    """An adapter whose second factors are not zero."""
    factors = init_lora(params, lora, jax.random.key(1))
    return jax.tree.map(lambda leaf: 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), factors)


def moved(mesh_config: MeshConfig, dit, *, lora: LoraConfig | None = None):
    """What the collectives of a step's compiled program move, laid out as on TPUs, and the number of its parameters."""
    jax.default_backend = lambda: "tpu"
    mesh, state, step, frozen = begin(mesh_config, dit, optimizer="adamw", lora=lora)
    compiled = step.lower(state, shard_batch(packed(0), mesh), *frozen).compile()
    return read_program(compiled.as_text(), dict(mesh.shape)).collectives, trees.count_values((state.params, frozen))


def train(mesh_config: MeshConfig, dit=DIT, *, optimizer: str, devices=None, steps: int = STEPS, lora=None):
    """The losses and gradient norms of some steps from rough parameters, the parameters after them, and how many
    arrays of the state are split."""
    mesh, state, step, frozen = begin(mesh_config, dit, optimizer=optimizer, devices=devices, lora=lora)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    found = []
    for number in range(steps):
        state, figures = step(state, shard_batch(packed(20 * number), mesh), *frozen)
        found.append([float(figures["loss"]), float(figures["gradient_norm"])])
    gathered = {path: whole(leaf) for path, leaf in trees.flatten(state.params).items()}
    return np.asarray(found), gathered, split


def whole(leaf) -> np.ndarray:
    """The global array, on every process."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(leaf).addressable_data(0))


def compare(found, expected, *, optimizer: str) -> None:
    """Losses to 1e-6, gradient norms to 5e-6; parameters under SGD, too: Adam amplifies the rounding of a gradient that
    is zero in truth, such as that of a key's bias."""
    np.testing.assert_allclose(found[0][:, 0], expected[0][:, 0], rtol=1e-6)
    np.testing.assert_allclose(found[0][:, 1], expected[0][:, 1], rtol=5e-6)
    if optimizer != "sgd":
        return
    for path, leaf in found[1].items():
        assert np.abs(leaf - expected[1][path]).max() <= 1e-6 * max(np.abs(expected[1][path]).max(), 1), path
