"""Checks of the objective: noise, times, dropped captions, targets, and how clips are averaged."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.trees import flatten
from dit_video.core.typing import AnyArray
from dit_video.diffusion import ClipSize, Objective
from dit_video.diffusion.objective import UniformWeighting
from dit_video.diffusion.processes import RectifiedFlow
from dit_video.diffusion.time_distributions import LogitNormal, Uniform
from dit_video.distributed import shard_batch
from dit_video.experiment.self_check.model_checks import change_text
from dit_video.experiment.self_check.subject import CheckedTraining, Problem
from dit_video.tokens import PackedBatch
from dit_video.training.losses.denoiser import get_clip_sizes

_STEPS = 512
"""Number of steps whose random numbers are drawn."""
_MAX_DISTANCE = 0.05
"""Largest Kolmogorov-Smirnov distance of times from their distribution; its expectation is below 0.02."""
_DEVIATIONS = 5.0
"""Number of standard errors that counts as a real difference."""
_TIMES = np.linspace(0.05, 0.95, 10, dtype=np.float32)
_TOLERANCE = 1e-3


LossFn = Callable[[PackedBatch, int], float]
"""Function from rows of this process and a step to the loss."""


class RandomNumbers(NamedTuple):
    """The random numbers of a training's first steps, for one batch."""

    noise: Float[AnyArray, "2 B N p"]
    """Noise of two steps."""
    times: Float[AnyArray, "s B G"]
    dropped: Bool[AnyArray, "s B G"]
    """Whether the caption of each clip is dropped."""
    sizes: ClipSize
    """Size of each clip `[B G]`."""
    segments: Int[AnyArray, "B N"]
    valid: Bool[AnyArray, "B G"]


def draw_numbers(subject: CheckedTraining, rows: PackedBatch) -> RandomNumbers:
    """Return the random numbers that the loss draws for a batch, the rows of all processes."""
    loss = subject.loss

    def draw(rows: PackedBatch) -> RandomNumbers:
        steps = jnp.arange(_STEPS)
        return RandomNumbers(
            jnp.stack([loss.draw_noise(rows, jnp.int32(step)) for step in (0, 1)]),
            jax.vmap(lambda step: loss.draw_times(rows, step))(steps),
            jax.vmap(lambda step: loss.draw_dropped_captions(rows, step))(steps),
            get_clip_sizes(rows),
            rows.segments,
            rows.valid,
        )

    return jax.tree.map(np.asarray, subject.jit(draw)(shard_batch(rows, subject.trainer.mesh)))


def check_noise(draws: RandomNumbers) -> list[Problem]:
    """Check that noise is standard normal, and another one for every step and clip."""
    first, second = draws.noise.astype(np.float64)
    segments, valid = draws.segments, draws.valid
    clips = [
        each
        for row, noise in enumerate(first)
        for index in np.flatnonzero(valid[row])
        if len(each := noise[segments[row] == index + 1])
    ]
    if not clips:
        return []
    values = np.concatenate([clip.ravel() for clip in clips])
    problems = []
    error = _DEVIATIONS / math.sqrt(len(values))
    if abs(values.mean()) > error or abs(values.std() - 1) > error:
        problems.append(f"noise has mean {values.mean():.2f} and standard deviation {values.std():.2f}")
    elif abs((fourth := np.mean(values**4)) - 3) > _DEVIATIONS * math.sqrt(96 / len(values)):
        problems.append(f"noise is not normal: its fourth moment is {fourth:.2f} instead of 3")
    is_clip = segments > 0
    if np.array_equal(first[is_clip], second[is_clip]):
        problems.append("two steps have the same noise")
    starts = [clip[0].tobytes() for clip in clips]
    if len(set(starts)) < len(starts):
        problems.append("two clips of a batch have the same noise")
    return [Problem("noise", each) for each in problems]


def check_times(subject: CheckedTraining, draws: RandomNumbers) -> list[Problem]:
    """Check the times of training against their distribution, and the times of an expert against its boundary."""
    training = subject.training
    drawn, valid, sizes = draws.times.astype(np.float64), draws.valid, draws.sizes
    times = drawn[:, valid]
    problems = []
    if times.min(initial=1) < 0 or times.max(initial=0) > 1:
        problems.append(f"times lie between {times.min():.2f} and {times.max():.2f}")
    if times.shape[1] > 1 and np.ptp(times, axis=1).max(initial=0) < 1e-6:
        problems.append("all clips of a batch have the same time")
    low, high = 0.0, 1.0
    if (expert := training.expert) is not None:
        low, high = (expert.boundary, 1.0) if expert.expert == "high" else (0.0, expert.boundary)
        if times.min() < low - _TOLERANCE or times.max() > high + _TOLERANCE:
            problems.append(
                f"the expert of {expert.expert} noise is trained at times from {times.min():.3f} to {times.max():.3f}, "
                f"not from {low:g} to {high:g}"
            )
    if (compute := _find_quantile(subject)) is not None and not problems:
        shares = np.stack([compute(drawn[:, row, i], sizes, row, i) for row, i in np.argwhere(valid)]).ravel()
        first, last = compute(np.asarray([low, high]), sizes, 0, 0) if expert is not None else (0.0, 1.0)
        shares = np.sort((shares - first) / (last - first))
        distance = np.abs(shares - (np.arange(len(shares)) + 0.5) / len(shares)).max()
        if distance > _MAX_DISTANCE:
            problems.append(
                f"the times of {_STEPS} steps are not distributed as the config says: their mean is {times.mean():.3f} "
                f"(largest difference of the distributions: {distance:.2f})"
            )
    return [Problem("times", each) for each in problems]


def _find_quantile(subject: CheckedTraining) -> Callable[..., np.ndarray] | None:
    """Return the function from times to the share of times below; None for distributions without a simple one."""
    objective = subject.training.make_objective(subject.model)
    process, distribution = objective.process, objective.times
    if not isinstance(process, RectifiedFlow) or not isinstance(distribution, Uniform | LogitNormal):
        return None

    def compute(times: np.ndarray, sizes: ClipSize, row: int, index: int) -> np.ndarray:
        shift = process.shift
        if process.size_shift is not None:
            size = ClipSize(*(int(np.asarray(part)[row, index]) for part in sizes))
            shift *= float(process.size_shift(size))
        unshifted = np.clip(times / (shift - (shift - 1) * times), 1e-7, 1 - 1e-7)
        if isinstance(distribution, Uniform):
            return unshifted
        logits = np.log(unshifted / (1 - unshifted))
        return _compute_normal_cdf((logits - distribution.mean) / distribution.std)

    return compute


_compute_normal_cdf = np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))), otypes=[np.float64])


def check_target(subject: CheckedTraining) -> list[Problem]:
    """Check that noising runs from data to noise, and that the target is what samplers take a prediction for.

    A prediction is a linear function of the data that a sampler estimates from it; so the prediction that stands for
    the true data follows from two estimates. The objective must have no loss for it.
    """
    objective = subject.training.make_objective(subject.model)
    process, prediction = objective.process, objective.prediction
    generator = subject.make_generator("objective")
    data, noise = (generator.standard_normal((len(_TIMES), 16)).astype(np.float32) for _ in range(2))
    if prediction.extract_values(jnp.asarray(data)).shape != data.shape:
        return []  # a model that predicts a variance, too
    try:
        result = jax.jit(functools.partial(_evaluate_target, objective))(data, noise, _TIMES)
    except (TypeError, ValueError):  # the variance is part of the loss
        return []
    target = jax.tree.map(np.asarray, result)
    problems = []
    if isinstance(process, RectifiedFlow):
        if np.abs(target.start - data).max() > 0.02:
            problems.append("noising does not begin with the data at time 0")
        if np.abs(target.end - noise).max() > 0.02:
            problems.append("noising does not end with noise at time 1")
    weights = target.weights
    if target.losses.max() > _TOLERANCE * max(1.0, weights.max()):
        problems.append("the target is not what samplers take a prediction for: a perfect model has a loss")
    elif isinstance(objective.weighting, UniformWeighting) and np.abs(weights - 1).max() > 0.02:
        problems.append(f"the loss of an error of 1 is {weights.mean():.2f}")
    if np.abs(target.model_times - _TIMES).max() > 1e-6:
        problems.append("the model gets other times than noise is added at")
    return [Problem("objective", each) for each in problems]


class _Target(NamedTuple):
    start: Float[Array, "k p"]
    """Noisy values near time 0."""
    end: Float[Array, "k p"]
    """Noisy values near time 1."""
    losses: Float[Array, " k"]
    """Loss of a model that predicts the data without an error."""
    weights: Float[Array, " k"]
    """Loss of a model whose prediction has an error of 1."""
    model_times: Float[Array, " k"]


def _evaluate_target(objective: Objective, data: Array, noise: Array, time: Array) -> _Target:
    process, prediction = objective.process, objective.prediction
    model_times = []

    def denoise(noisy, model_time, offset):
        model_times.append(model_time)
        token_time = model_time[..., None]
        unscaled = noisy / process.input_scale(token_time)
        low, high = (
            prediction.estimate(process, unscaled, jnp.full_like(unscaled, each), token_time).data for each in (0, 1)
        )
        return (data - low) / (high - low) + offset, None

    def compute(offset: float) -> Array:
        return objective.loss(lambda noisy, model_time, _: denoise(noisy, model_time, offset), data, noise, time)

    start, end = (process.add_noise(data, noise, jnp.full_like(time, each)[:, None]) for each in (1e-3, 1 - 1e-3))
    return _Target(start, end, compute(0.0), compute(1.0), model_times[0])


def check_caption_dropout(subject: CheckedTraining, draws: RandomNumbers) -> list[Problem]:
    """Check how often captions are dropped, and that dropped ones have the text of unconditional samples."""
    loss, rate = subject.loss, subject.training.caption_dropout
    drawn = draws.dropped[:, draws.valid]
    problems = []
    error = _DEVIATIONS * math.sqrt(max(rate * (1 - rate), 1e-9) / max(1, drawn.size))
    if abs(drawn.mean() - rate) > error:
        problems.append(f"{drawn.mean():.1%} of the captions are dropped, not {rate:.1%}")
    empty = np.asarray(subject.text_encoder(""))
    if loss.empty_caption.shape != empty.shape or not np.allclose(loss.empty_caption, empty, atol=2e-2, rtol=2e-2):
        problems.append("dropped captions have another text than unconditional samples")
    return [Problem("caption_dropout", each) for each in problems]


def check_loss_mean(compute: LossFn, rows: PackedBatch, draws: RandomNumbers) -> list[Problem]:
    """Check that the loss is the mean over clips that count, and that dropped captions alone have no effect.

    Args:
      compute: The loss of rows at a step, with parameters without zeros.
      rows: A batch of this process.
      draws: Random numbers of the batch.
    """
    problems = []
    valid, segments = np.asarray(rows.valid), np.asarray(rows.segments)
    is_first = np.arange(valid.shape[1]) == 0
    first, others = valid & is_first, valid & ~is_first
    tokens = np.asarray(rows.tokens)
    # Clips of the first part have larger values, so that both parts differ in their loss.
    scaled = rows._replace(tokens=np.where((segments == 1)[..., None], 3 * tokens, tokens))
    whole = compute(scaled, 0)
    counts = [int((draws.valid & part).sum()) for part in (is_first, ~is_first)]
    if min(counts) > 0:
        parts = [compute(scaled._replace(valid=part), 0) for part in (first, others)]
        mean = sum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        if abs(whole - mean) > _TOLERANCE * abs(mean):
            problems.append(
                Problem("loss_mean", f"the loss of a batch is {whole:.4f}, the mean over its clips {mean:.4f}")
            )
        elif abs(parts[0] - whole) <= 1e-6 * abs(whole):
            problems.append(Problem("loss_mean", "clips that are not valid count in the loss"))
        alone = compute(_keep_first_clips(scaled._replace(valid=first)), 0)
        if abs(alone - parts[0]) > _TOLERANCE * abs(alone):
            message = f"the loss of clips alone in their rows is {alone:.4f}, beside others {parts[0]:.4f}"
            problems.append(Problem("loss_mean", message))
    noised = np.where((segments == 0)[..., None], np.float32(100), scaled.tokens)
    if abs(compute(scaled._replace(tokens=noised), 0) - whole) > _TOLERANCE * abs(whole):
        problems.append(Problem("loss_mean", "padding counts in the loss"))
    return problems + _check_dropped_text(compute, rows, draws)


def _keep_first_clips(rows: PackedBatch) -> PackedBatch:
    """Return rows in which all clips but the first are padding."""
    segments, text_segments = np.asarray(rows.segments), np.asarray(rows.text_segments)
    layout = dataclasses.replace(rows.layout, segments=np.where(segments == 1, segments, 0))
    return rows._replace(layout=layout, text_segments=np.where(text_segments == 1, text_segments, 0))


def _check_dropped_text(compute: LossFn, rows: PackedBatch, draws: RandomNumbers) -> list[Problem]:
    """Check that the loss of a clip depends on the text unless its caption is dropped."""
    problems = list[Problem]()
    if len(draws.valid) != len(rows.valid):
        return problems  # other processes have rows of their own
    other = change_text(rows, np.asarray(rows.text_segments) > 0)
    for is_dropped in (True, False):
        matches = (draws.dropped == is_dropped) & draws.valid
        step = int(matches.sum(axis=(1, 2)).argmax())
        if not matches[step].any():
            continue
        chosen = matches[step]
        losses = [compute(each._replace(valid=chosen), step) for each in (rows, other)]
        change = abs(losses[1] - losses[0]) / abs(losses[0])
        if is_dropped and change > 1e-5:
            problems.append(Problem("caption_dropout", "the loss of clips with dropped captions depends on the text"))
        if not is_dropped and change <= 1e-7:
            problems.append(Problem("text_conditioning", "the loss of clips does not depend on their captions"))
    return problems


def check_precision(state: Any) -> list[Problem]:
    """Check that what a training accumulates is float32: parameters, averages and moments."""
    problems = []
    for name in ("params", "ema", "opt_state"):
        for path, leaf in flatten(getattr(state, name)).items():
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
                problems.append(f"{name}/{path} is {leaf.dtype}, in which small updates are lost")
    return [Problem("precision", each) for each in problems]
