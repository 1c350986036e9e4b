"""Auxiliary losses of a denoiser's training: one value per clip, added with a weight, with trained heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.diffusion import Edm, Objective, Preconditioning, RectifiedFlow, ThresholdedPrediction, Velocity
from dit_video.models.backbones.unet import UnetConfig
from dit_video.nn import ONE_DEVICE, Linear, LoraConfig, get_graph_def, init_lora
from dit_video.training.losses.auxiliary import AUXILIARY, AuxiliaryLoss, check_losses, init_heads, make_terms
from dit_video.training.losses.denoiser import TEMPORAL_PATHS, LoraLoss
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from dit_video.training.step import accumulate_gradients, compute_gradients
from support.denoiser_loss import DIT, LOSS, PARAMS, A, B, C, make_batch
from support.devices import check_on_eight_devices
from support.random_params import make_random_params

BACKBONE = dataclasses.replace(DIT, layers=3)
WIDTH = BACKBONE.token_width


class Map(nnx.Module):
    """A linear map."""

    def __init__(self, linear):
        self.linear = linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded(AuxiliaryLoss):
    """Error of the clean tokens that a linear head reads from features."""

    name: str = "decoded"

    def make_head(self, backbone, *, partitioner, rngs):
        return Map(Linear(backbone.width, backbone.token_width, partitioner=partitioner, rngs=rngs))

    def compute(self, head, inputs):
        (features,) = inputs.features.values()
        error = head.linear(features) - inputs.rows.tokens
        return inputs.rows.layout.mean(jnp.square(error).mean(axis=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brightness(AuxiliaryLoss):
    """Error of the mean of the estimated clean clip."""

    name: str = "brightness"

    def compute(self, head, inputs):
        difference = inputs.rows.layout.mean(inputs.estimate.data - inputs.rows.tokens)
        return jnp.square(difference.mean(axis=-1))


LOSSES = Decoded(weight=0.5, schedule=Constant(warmup=10), blocks=(1,)), Brightness(weight=3.0)
PARAMS = PARAMS | {"backbone": make_random_params(BACKBONE.make)} | init_heads(LOSSES, BACKBONE, jax.random.key(1))
PLAIN = dataclasses.replace(LOSS, backbone=get_graph_def(BACKBONE.make))
STEP = 4


def make_loss(*losses, start_step=0, **fields):
    terms = make_terms(losses, BACKBONE, ONE_DEVICE, steps=20, start_step=start_step)
    return dataclasses.replace(PLAIN, auxiliary=terms, **fields)


def run(loss, rows, params=PARAMS, step=STEP):
    """Return the value, the metrics and the gradients of a loss."""
    output, gradients = jax.jit(functools.partial(compute_gradients, loss))(params, rows, jnp.asarray(step))
    return float(output.value), output.details.metrics, flatten(gradients)


def mean(metric):
    return float(metric.total / metric.number)


def test_the_loss_is_the_weighted_sum_of_means_over_the_clips():
    rows, model = make_batch([A, B], [C]), {name: PARAMS[name] for name in ("backbone", "text")}
    value, metrics, gradients = run(make_loss(*LOSSES), rows)
    expected, _, plain = run(PLAIN, rows, model)
    assert mean(metrics["loss_denoising"]) == pytest.approx(expected, rel=1e-6)
    weight = 0.5 * (0.1 + 0.9 * STEP / 10)
    parts = weight * mean(metrics["loss_decoded"]) + 3 * mean(metrics["loss_brightness"])
    assert value == pytest.approx(expected + parts, rel=1e-6)
    assert parts > 0.1 * expected
    assert np.abs(gradients[f"{AUXILIARY}/decoded/linear/kernel"]).max() > 1e-3
    # Features reach the blocks up to their own; the estimate reaches all.
    _, _, decoded = run(make_loss(LOSSES[0]), rows)
    for path in (path for path in plain if path.startswith("backbone/blocks/") and path.endswith("kernel")):
        change = np.abs(decoded[path] - plain[path]).max(axis=(1, 2))
        assert change[2] < 1e-6 < 1e-5 < change[:2].min(), path
        assert np.abs(gradients[path] - decoded[path]).max(axis=(1, 2)).min() > 1e-5, path
    later = run(make_loss(*LOSSES, start_step=STEP), rows)[0]
    assert later == pytest.approx(expected + parts + (0.05 - weight) * mean(metrics["loss_decoded"]), rel=1e-5)


@pytest.mark.parametrize(
    "prediction",
    [
        Velocity(),
        pytest.param(
            ThresholdedPrediction(prediction=Velocity(), quantile=0.8, max_threshold=2.0), marks=pytest.mark.slow
        ),
    ],
    ids=["velocity", "thresholded"],
)
def test_a_clip_has_the_same_losses_wherever_and_with_whatever_it_is_packed(prediction):
    loss = make_loss(*LOSSES, objective=dataclasses.replace(PLAIN.objective, prediction=prediction))
    alone = [run(loss, make_batch([one], [])) for one in (A, B, C)]
    for rows in (make_batch([A, B], [C]), make_batch([C, B, A], [])):
        value, metrics, gradients = run(loss, rows)
        assert value == pytest.approx(np.mean([each for each, _, _ in alone]), rel=1e-5)
        for name in ("loss_denoising", "loss_decoded", "loss_brightness"):
            assert mean(metrics[name]) == pytest.approx(np.mean([mean(each[name]) for _, each, _ in alone]), rel=1e-5)
        for path, gradient in gradients.items():
            expected = sum(each[path] for _, _, each in alone) / 3
            np.testing.assert_allclose(gradient, expected, atol=2e-5 * max(1, np.abs(expected).max()), err_msg=path)
    rows = make_batch([A, B], [C])
    damaged = rows._replace(valid=rows.valid & ~np.asarray([[False, True, False], [False] * 3]))
    assert run(loss, damaged)[0] == pytest.approx(np.mean([alone[0][0], alone[2][0]]), rel=1e-5)
    assert run(loss, make_batch([], []))[0] == 0


def test_training_lowers_an_auxiliary_loss():
    """It falls with its weight: the head learns, and the features with it."""
    rows, step = jax.device_put(make_batch([A, B], [C])), jnp.asarray(STEP)
    last = []
    for loss in (make_loss(dataclasses.replace(LOSSES[0], weight=10.0)), make_loss(LOSSES[0])):
        optimizer = AdamW(learning_rate=1e-2, schedule=Constant(warmup=0)).make(steps=60)

        @jax.jit
        def train(params, loss=loss, optimizer=optimizer):
            def update(carry, _):
                params, state = carry
                output, gradients = compute_gradients(loss, params, rows, step)
                updates, state = optimizer.update(gradients, state, params)
                return (optax.apply_updates(params, updates), state), output.details.metrics["loss_decoded"].total

            return jax.lax.scan(update, (params, optimizer.init(params)), length=60)[1]

        values = train(PARAMS)
        assert values[-1] < 0.5 * values[0]
        last.append(values[-1])
    assert last[0] < last[1]


@pytest.mark.slow
def test_a_mesh_of_eight_devices_trains_as_one_device():
    """Heads are sharded by the rules of all parameters, and features are those of all devices' tokens."""
    check_on_eight_devices("auxiliary_on_eight_devices.py")


@pytest.mark.slow
def test_parts_of_a_batch_make_its_gradients_and_metrics():
    rows, loss = make_batch([A, B, C], [A._replace(example=8)], [], [C, A]), make_loss(*LOSSES)
    value, metrics, gradients = run(loss, rows)
    accumulate = jax.jit(functools.partial(accumulate_gradients, loss, 4))
    output, parts = accumulate(PARAMS, rows, jnp.asarray(STEP))
    assert float(output.value) == pytest.approx(value, rel=1e-5)
    for name, metric in output.details.metrics.items():
        np.testing.assert_allclose(metric, metrics[name], rtol=1e-5, err_msg=name)
    for path, gradient in flatten(parts).items():
        np.testing.assert_allclose(gradient, gradients[path], atol=2e-5, err_msg=path)


def test_validation_measures_auxiliary_losses_and_returns_the_denoisers_own():
    rows = make_batch([A, B], [C])
    trained = run(make_loss(*LOSSES), rows)[1]
    value, metrics, gradients = run(make_loss(*LOSSES, is_training=False), rows)
    assert value == pytest.approx(mean(trained["loss_denoising"]), rel=1e-6)
    assert mean(metrics["loss_decoded"]) == pytest.approx(mean(trained["loss_decoded"]), rel=1e-6)
    assert np.abs(gradients[f"{AUXILIARY}/decoded/linear/kernel"]).max() == 0


@pytest.mark.parametrize(
    ("process", "prediction"), [(RectifiedFlow(), Velocity()), (Edm(), Preconditioning())], ids=["flow", "edm"]
)
def test_the_estimate_is_that_of_the_prediction(process, prediction):
    """The denoising error of the estimated data is the loss, up to the weights that follow from the time."""
    seen = []

    class Keep(Brightness):
        def compute(self, head, inputs):
            seen.append(inputs)
            return super().compute(head, inputs)

    objective = Objective(process=process, prediction=prediction)
    loss, rows = make_loss(Keep(), objective=objective), make_batch([A, B], [C])
    with jax.disable_jit():
        output = loss(PARAMS, rows, jnp.asarray(STEP))
    (inputs,) = seen
    time = inputs.time[..., None]
    target = prediction.target(process, jnp.asarray(rows.tokens), loss.draw_noise(rows, jnp.asarray(STEP)), time)
    predicted = prediction.target(process, inputs.estimate.data, inputs.estimate.noise, time)
    per_token = jnp.square(predicted - target).mean(axis=-1)
    expected = (rows.layout.mean(per_token) * rows.valid).sum() / 3
    assert mean(output.details.metrics["loss_denoising"]) == pytest.approx(float(expected), rel=1e-4)
    assert inputs.step == STEP
    assert not inputs.features


def test_heads_are_trained_with_temporal_layers_and_with_adapters():
    rows, head = make_batch([A, B], [C]), f"{AUXILIARY}/decoded/linear/kernel"
    _, _, gradients = run(make_loss(*LOSSES, optimizer=AdamW(trainable=(TEMPORAL_PATHS,))), rows)
    assert {path for path, leaf in gradients.items() if np.abs(leaf).max() > 0} == {
        head,
        head.replace("kernel", "bias"),
    }
    own = AdamW(trainable=("^backbone/",))
    assert np.abs(run(make_loss(*LOSSES, optimizer=own), rows)[2][head]).max() == 0

    model = {name: PARAMS[name] for name in ("backbone", "text")}
    factors = init_lora(model, LoraConfig(rank=2, targets=(r"^backbone/blocks/.*kernel$",)), jax.random.key(0))
    adapted = LoraLoss(loss=make_loss(*LOSSES), scale=0.5)
    compute = jax.jit(functools.partial(compute_gradients, adapted))
    output, gradients = compute(factors | {AUXILIARY: PARAMS[AUXILIARY]}, rows, jnp.asarray(STEP), model)
    assert float(output.value) == pytest.approx(run(make_loss(*LOSSES), rows)[0], rel=1e-5)
    assert np.abs(flatten(gradients)[head]).max() > 1e-3


def test_invalid_losses_are_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class PerToken(Brightness):
        def compute(self, head, inputs):
            return inputs.time

    rows = make_batch([A, B], [C])
    unet = UnetConfig(channels=2, context_width=6, width=8, heads=1)
    for call, match in (
        (lambda: Brightness(name="a b"), r"name='a b' is invalid"),
        (lambda: Brightness(name="denoising"), r"name='denoising' is invalid"),
        (lambda: Brightness(weight=0.0), r"weight=0.0 is invalid: it must be positive"),
        (lambda: Decoded(blocks=(1, 1)), r"blocks=\[1, 1\] is invalid: a block is named twice"),
        (lambda: check_losses((Brightness(), Brightness()), BACKBONE, steps=9), r"brightness, brightness\) is invalid"),
        (lambda: check_losses((Decoded(blocks=(3,)),), BACKBONE, steps=9), r"blocks=\[3\] is invalid.* Use 0 to 2"),
        (lambda: check_losses((Decoded(blocks=(0,)),), unet, steps=9), "not made of equal blocks"),
        (lambda: check_losses(LOSSES, BACKBONE, steps=9), r"warmup=10 is invalid"),
        (
            lambda: run(make_loss(PerToken()), rows),
            r"shape \[2, 20\], not one value per clip, \[2, 3\]. Use layout.mean",
        ),
    ):
        with pytest.raises(UserError, match=match):
            call()
    check_losses((Brightness(),), unet, steps=9)
