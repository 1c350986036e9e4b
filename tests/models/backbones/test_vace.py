"""VACE's transformer: packing, hints with a strength each, their layers, and the control in training."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.distributed import Parallelism, make_shardings
from dit_video.distributed.mesh import make_abstract_mesh
from dit_video.models.backbones.vace import VaceControl, VaceDitConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.nn.attention import SpaceOnly
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from support.jaxprs import count_primitive
from support.packed_rows import (
    TEXT_WIDTH,
    assert_packed_is_unpacked,
    assert_segments_are_apart,
    make_batch,
    predict,
)
from support.random_params import make_random_params

SIZES = {
    "channels": 2,
    "context_width": TEXT_WIDTH,
    "width": 12,
    "mlp_dim": 20,
    "layers": 4,
    "heads": 1,
    "time_width": 8,
    "text_length": 4,
    "attention": "dense",
}
CONTROL = VaceControl(latent_channels=1, mask_channels=1, layers=2)
CONFIG = VaceDitConfig(conditioning=(CONTROL,), **SIZES)


@pytest.fixture(scope="module")
def params():
    return make_random_params(CONFIG.make)


@pytest.mark.slow
def test_packed_clips_are_those_of_separate_rows(params):
    assert_packed_is_unpacked(params, CONFIG)


@pytest.mark.nightly
def test_a_clips_prediction_does_not_depend_on_its_neighbours(params):
    assert_segments_are_apart(params, CONFIG)


def call(params, batch, strengths, *, config=CONFIG):
    """Return the prediction, and the tokens after each block, before a hint is added."""

    @jax.jit
    def run(params, strengths):
        model = nnx.merge(get_graph_def(config.make), params)
        values = batch.get_conditioning(config)
        control = CONTROL.record(batch.latents, jnp.broadcast_to(strengths, (*batch.time.shape, 2)))
        x, inputs = model.embed_inputs(batch.noisy, batch.time, batch.layout, values.add(control))

        def record(block, x, inputs, attention, _values):
            x = block(x, inputs, attention)
            return x, x

        x, outputs = model.apply_blocks(x, inputs, wrapper=record)
        return model.apply_head(x, inputs), outputs

    return run(params, jnp.asarray(strengths, jnp.float32))


@pytest.mark.nightly
def test_without_strength_the_model_is_wans(params):
    batch, wan = make_batch((0, 1)), WanDitConfig(**SIZES)
    base = {name: part for name, part in params.items() if name != "control"}
    prediction, _ = call(params, batch, [0, 0])
    np.testing.assert_allclose(prediction, predict(base, batch, wan), atol=1e-5)


@pytest.mark.slow
def test_each_hint_is_added_after_its_own_block(params):
    batch = make_batch((0, 1))
    none, *others = ([np.asarray(each)[0, :14] for each in call(params, batch, s)[1]] for s in ([0, 0], [1, 0], [0, 1]))
    assert len(none) == 4
    for layer, changed in zip(CONFIG.hint_layers, others, strict=True):
        for block in range(4):
            difference = np.abs(changed[block] - none[block]).max()
            assert difference == 0 if block <= layer else difference > 1e-3, (layer, block)


@pytest.mark.nightly
def test_the_number_of_products_does_not_grow_with_depth():
    def count(layers):
        control = VaceControl(latent_channels=1, mask_channels=1, layers=layers // 2)
        config = CONFIG.replace(layers=layers, conditioning=(control,), remat="full")
        batch = make_batch((0, 1))

        def run(params):
            model = nnx.merge(get_graph_def(config.make), params)
            return model(batch.noisy, batch.time, batch.layout, batch.get_conditioning(config))[0]

        return count_primitive("dot_general", jax.make_jaxpr(run)(get_param_shapes(config.make)).jaxpr)

    assert count(8) == count(4)


def test_control_layers_are_sharded_as_blocks_are():
    mesh = make_abstract_mesh(Parallelism(data=1, fsdp=2, tensor=2), 4)
    specs = flatten(make_shardings(get_param_shapes(VaceDitConfig().make), mesh), is_leaf=lambda x: hasattr(x, "spec"))
    blocks = {path: each.spec for path, each in specs.items() if path.startswith("blocks/")}
    assert P(None, "fsdp", "tensor") in blocks.values()
    assert {path: specs[f"control/{path}"].spec for path in blocks} == blocks
    assert specs["control/blocks/hint/kernel"].spec in (P(None, "fsdp", None), P(None, None, "fsdp"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning": ()}, r"conditioning \(none\) is invalid.*VaceControl"),
        ({"layers": 3}, "layers=3 is invalid: .* 2 control layers"),
        ({"pattern": (SpaceOnly(), SpaceOnly())}, "pattern=.* is invalid"),
    ],
)
def test_invalid_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        CONFIG.replace(**changes)


def test_a_request_names_clips_and_a_mask_in_the_place_of_the_control():
    with pytest.raises(UserError, match=r"Use control=, video= with generated=, or reference_images=") as error:
        VaceControl().from_request(1.0, Grid(1, 2, 2))
    used = re.findall(r"(\w+)=(?=[ ,]|$)", str(error.value))
    assert used == ["control", "video", "generated", "reference_images"]
    assert set(used) <= {field.name for field in dataclasses.fields(Request)}


def test_first_frames_are_dropped_in_training_and_never_in_sampling():
    """A dropped clip has the reactive latents as inactive ones, too, and a mask of ones."""
    control = VaceControl(latent_channels=1, mask_channels=1, layers=2, dropout=0.5)
    batch = make_batch(*[(0, 1)] * 16)
    keys = jax.random.split(jax.random.key(0), batch.time.shape)
    trained = control.prepare(batch.latents, batch.layout, keys, None)
    assert trained.strengths.shape == (16, 3, 2)
    assert (trained.strengths == 1).all()
    before, after = (np.asarray(each).reshape(16, -1, 4, 3)[:, :14] for each in (batch.latents, trained.values))
    dropped = np.stack([before[..., 1], before[..., 1], np.ones_like(before[..., 1])], axis=-1)
    kept = []
    for clip in (slice(0, 8), slice(8, 14)):
        is_kept = (after[:, clip] == before[:, clip]).all(axis=(1, 2, 3))
        assert (is_kept | (after[:, clip] == dropped[:, clip]).all(axis=(1, 2, 3))).all()
        kept += is_kept.tolist()
    assert 8 < sum(kept) < 24
    sampled = control.prepare(batch.latents, batch.layout, keys, jnp.full((16, 3, 2), 0.5))
    np.testing.assert_array_equal(sampled.values, batch.latents)
