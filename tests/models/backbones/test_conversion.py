"""Models made from trained ones: they predict the same until their new parameters are trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten, map_with_path
from dit_video.models.backbones.conversion import add_temporal_layers, grow, grow_config
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.positions import BoundaryEmbedding, SineCosine
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig, TemporalLayers
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import ClipConditioning
from dit_video.nn import get_graph_def, init_params
from dit_video.nn.attention import TimeOnly
from dit_video.tokens import Field
from dit_video.training.optim.optimizer import AdamW
from support.packed_rows import CLASSES, COND_WIDTH, FIRST, TEXT_WIDTH, make_batch, predict, predict_with_gradients
from support.random_params import make_random_params

IMAGE = DiTConfig(channels=2, context_width=TEXT_WIDTH, width=24, layers=2, heads=2, mlp_ratio=2.0)
VIDEO = SpatioTemporalDiTConfig(
    channels=2, context_width=TEXT_WIDTH, width=24, layers=2, heads=2, mlp_ratio=2.0, temporal=TemporalLayers()
)
WAN = WanDitConfig(
    channels=2, context_width=TEXT_WIDTH, text_length=5, width=24, mlp_dim=40, layers=2, heads=2, time_width=32
)
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed(ClipConditioning):
    """A number of a clip."""

    field = Field(name="speed", alignment="example")

    def from_clip(self, view):
        return np.float32(0)

    def from_request(self, value, latents):
        return np.float32(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course(Speed):
    """Another number."""

    record = type("Course", (Speed.record,), {})
    field = Field(name="course", alignment="example")


def as_images(batch):
    """Return the first clip's two frames as two images, with its text and time."""
    halves = jnp.where(jnp.arange(18) < 4, 1, jnp.where(jnp.arange(18) < 8, 2, 0))[None]
    return batch._replace(
        segments=halves,
        positions=batch.positions * jnp.asarray([0.0, 1.0, 1.0]),
        time=batch.time.at[:, 1].set(batch.time[:, 0]),
        labels=batch.labels.at[:, 1].set(batch.labels[:, 0]),
        context=batch.context.at[:, 3:6].set(batch.context[:, :3]),
        context_segments=jnp.asarray([[1, 1, 1, 2, 2, 2, 0]]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "temporal"),
    [
        (dataclasses.replace(IMAGE, absolute_position=BoundaryEmbedding()), TemporalLayers()),
        (
            # As DiT-XL/2's image models are.
            dataclasses.replace(
                IMAGE,
                absolute_position=SineCosine(),
                rotary="none",
                modulation="own",
                classes=CLASSES,
            ),
            TemporalLayers(spatial_layers=2, layers=3),
        ),
    ],
    ids=["alternating", "in a block"],
)
def test_a_new_video_model_predicts_every_frame_like_the_image_model(config, temporal):
    params, batch = make_random_params(config.make), make_batch((0,))
    video = add_temporal_layers(config, spatial_layers=temporal.spatial_layers, layers=temporal.layers)
    assert video.temporal == temporal
    assert grow_config(config, video) == video
    grown = grow(config, params, video, KEY)
    expected = predict(params, as_images(batch), config)[:, FIRST]
    result, gradients, _ = predict_with_gradients(grown, batch, video)
    np.testing.assert_allclose(result[:, FIRST], expected, atol=1e-6)
    assert np.abs(expected).max() > 0.1
    # What is new learns, and once it has learned frames know of each other.
    new = {path for path in flatten(grown) if path not in flatten(params)}
    for path in ("temporal_blocks/out/kernel", "temporal_blocks/down/kernel", "temporal_position/kernel"):
        assert np.abs(flatten(gradients)[path]).max() > 1e-3
    rough = flatten(make_random_params(video.make))
    trained = map_with_path(lambda path, leaf: rough[path] if path in new else leaf, grown)
    before = predict(trained, batch, video)
    after = predict(trained, batch._replace(noisy=batch.noisy.at[:, 0].add(1.0)), video)
    assert np.abs(after - before)[0, 4].max() > 1e-3  # the same place in the second frame


def test_temporal_layers_alone_are_trained_by_their_name():
    assert add_temporal_layers(IMAGE) == VIDEO
    grown = grow(IMAGE, make_random_params(IMAGE.make), VIDEO, KEY)
    trains = AdamW(trainable=("temporal",)).is_trained
    new = {path for path in flatten(grown) if path not in flatten(make_random_params(IMAGE.make))}
    assert new
    assert {path for path in flatten(grown) if trains(path)} == new


@pytest.mark.nightly
def test_a_video_model_from_nothing_trains_its_temporal_layers():
    """Its gates are zero, too; if its last kernels were zero as well, neither would have a gradient."""
    params = jax.jit(init_params, static_argnums=0)(VIDEO.make, KEY)
    params["head"]["kernel"] = params["head"]["kernel"] + 0.1 * make_random_params(VIDEO.make)["head"]["kernel"]
    _, gradients, _ = predict_with_gradients(params, make_batch((0,)), VIDEO)
    assert np.abs(flatten(gradients)["temporal_blocks/out/kernel"]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        IMAGE,
        dataclasses.replace(IMAGE, cond_channels=1),
        WAN,
    ],
    ids=["none", "one", "wan"],
)
def test_a_model_with_more_conditioning_channels_predicts_the_same_at_first(config):
    params, batch = make_random_params(config.make), make_batch((0, 1), ())
    if config.cond_channels:
        old = batch.latents.reshape(*batch.latents.shape[:2], 4, -1)[..., :1]
        expected = predict(params, batch._replace(latents=old.reshape(*old.shape[:2], -1)), config)
    else:
        expected = predict(params, batch, config)
    target = dataclasses.replace(config, cond_channels=3)
    assert grow_config(config, target) == target
    assert target.cond_width == COND_WIDTH
    grown = grow(config, params, target, KEY)
    result, gradients, _ = predict_with_gradients(grown, batch, target)
    np.testing.assert_allclose(result[0, :14], expected[0, :14], atol=1e-6)
    path = "embed/kernel" if isinstance(config, WanDitConfig) else "cond_embed/kernel"
    assert (np.abs(flatten(gradients)[path]).max(axis=1) > 1e-4).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: grow(IMAGE, params | {"more": params["head"]}, VIDEO, KEY), "more/bias has "),
        (lambda params: grow(IMAGE, {"head": params["head"]}, VIDEO, KEY), "has shape None, the config implies"),
        (lambda params: grow(IMAGE, params, IMAGE.replace(layers=4), KEY), "the config implies"),
        (
            lambda params: add_temporal_layers(IMAGE.replace(pattern=TimeOnly())),
            r"pattern=TimeOnly\(\) is invalid: .* Use a model with Full\(\) or SpaceOnly\(\)",
        ),
        (
            lambda params: add_temporal_layers(IMAGE.replace(registers=1)),
            "registers=1 is invalid: .* Use a model with 0",
        ),
        (lambda params: add_temporal_layers(WAN), r"a model of WanDitConfig cannot get temporal layers\."),
    ],
)
def test_invalid_conversions_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make(make_random_params(IMAGE.make))


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (IMAGE, IMAGE.replace(layers=4)),
        (VIDEO, VIDEO.replace(temporal=TemporalLayers(layers=2))),
        (VIDEO, IMAGE),
        (IMAGE.replace(cond_channels=3), IMAGE),
        (IMAGE.replace(time="token"), IMAGE),
        (IMAGE.replace(conditioning=(Speed(), Course())), IMAGE.replace(conditioning=(Course(), Speed()))),
        (WAN, WAN.replace(image_width=32)),
        (IMAGE, WAN),
    ],
)
def test_what_is_not_grown_differs(config, target):
    assert grow_config(config, target) != target


@pytest.mark.parametrize("changes", [{"time": "token"}, {"conditioning": (Speed(), Course())}])
def test_a_model_with_further_conditioning_predicts_the_same_at_first(changes):
    """Values of new conditioning act once they are trained."""
    config = IMAGE.replace(conditioning=(Speed(),))
    params, batch, target = make_random_params(config.make), make_batch((0, 1)), config.replace(**changes)
    assert grow_config(config, target) == target
    speeds = Speed.record(jnp.ones((1, 3)))

    def predict_with(params, config, *records):
        conditioning = batch.get_conditioning(config).add(speeds, *records)
        model = nnx.merge(get_graph_def(config.make), params)
        time = batch.get_time(IMAGE)
        time = batch.layout.expand(time) if config.time == "token" else time
        return model(batch.noisy, time, batch.layout, conditioning)[0][0, :14]

    records = [each.record(jnp.ones((1, 3))) for each in target.conditioning[1:]]
    grown = grow(config, params, target, KEY)
    expected = predict_with(params, config)
    # A time for each token is a product of another shape, whose rounding is relative to the largest values.
    scale = 1 if target.time == config.time else np.abs(expected).max()
    np.testing.assert_allclose(predict_with(grown, target, *records), expected, atol=1e-6 * scale)
    if records:
        trained = make_random_params(target.make)
        grown["cond_course"] = trained["cond_course"]
        assert np.abs(predict_with(grown, target, *records) - expected).max() > 1e-3
