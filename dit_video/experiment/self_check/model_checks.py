"""Checks of the model: which of its inputs each output depends on, and its gradients.

Clips of a row must not see one another, and each must see its own tokens, text, time and positions. A new model
depends on nothing, as the weights of its gates and its head are zero; so small weights get random values first.
Gradients are compared with finite differences, and must reach every parameter that the loss depends on.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dit_video.core.trees import flatten, map_with_path
from dit_video.core.typing import AnyArray
from dit_video.distributed import make_shardings, shard_batch
from dit_video.distributed.sharding import DEFAULT_RULES
from dit_video.experiment.self_check.step_checks import COUNT, ValueReader
from dit_video.experiment.self_check.subject import CheckedTraining, Problem
from dit_video.models.conditioning import COND_LATENTS, ConditioningLatents
from dit_video.tokens import PackedBatch
from dit_video.tokens.positions import Rotary3d, compute_rotary_angles
from dit_video.training.digests import mix_bits, number_values

SMALL = 0.02
"""Root mean square of a parameter below which it gets random values."""
NOISE = 0.05
"""Standard deviation of these values."""
_UNCHANGED = 1e-3
"""Largest change of an output, relative to its root mean square, that counts as rounding. Matrix products in bfloat16
round by 0.004, but equal inputs are rounded alike."""
_CHANGED = 1e-6
"""Smallest change that counts as one."""
_MIN_TIME_RATIO = 0.01
"""Smallest change for `_TIME_STEP`, relative to that for 0.2; it is 0.0035 if the outputs change linearly with time."""
POSITION_PATHS = r"(^|/)(temporal_)?position(/|$)"
"""Regular expression for the paths of embeddings that add positions to the tokens."""
_MASK_STEPS = 64
_TIMES = 0.7, 0.3
_TIME_STEP = 7e-4
"""Difference of two times that bfloat16, and times in whole thousandths, cannot tell apart."""


def perturb(params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters whose small ones have random values added. Traceable."""

    def add(path: str, leaf: Array) -> Array:
        is_small = jnp.sqrt(jnp.square(leaf.astype(jnp.float32)).mean()) < SMALL
        return (leaf + jnp.where(is_small, NOISE, 0) * make_noise(path, leaf.shape)).astype(leaf.dtype)

    return map_with_path(add, params)


def make_noise(path: str, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Return uniform noise of variance 1 that depends on the path. Traceable.

    It takes a tenth of the time that `jax.random` takes to compile for every parameter.
    """
    words = mix_bits(number_values(shape, start=zlib.crc32(path.encode())))
    unit = (words >> 8).astype(jnp.float32) / 2.0**24
    return (unit - 0.5) * 12**0.5


class _Inputs(NamedTuple):
    """Inputs of the model that a check changes, arrays of the host."""

    rows: PackedBatch
    noisy: Float[AnyArray, "B N p"]
    time: Float[AnyArray, "B N"]


_Change = Callable[[_Inputs], _Inputs]


class ModelProbe:
    """The model on one batch.

    Args:
      subject: The training.
      params: Trained parameters without zeros.
      rows: A batch of this process.
      is_zeroed: Whether the weights of embeddings that add positions to tokens are zero.
    """

    def __init__(self, subject: CheckedTraining, params: Any, rows: PackedBatch, *, is_zeroed: bool = False):
        self._subject, self.rows = subject, rows
        self._params = params, subject.frozen_params
        if is_zeroed:
            self._params = map_with_path(_zero_positions, self._params)
        self.segments = np.asarray(rows.segments)
        self.last = self.segments == self.segments.max(axis=1, keepdims=True)
        """True for the tokens of the last clip of each row."""
        time = np.where(self.last, *_TIMES).astype(np.float32)
        noisy = subject.make_generator("noisy").standard_normal(rows.tokens.shape).astype(np.float32)
        self._inputs = _Inputs(rows, np.where((self.segments > 0)[..., None], noisy, np.float32(0)), time)
        self._compute = subject.jit(self._compute_change)

    def _predict(self, params, frozen, inputs: _Inputs) -> Float[Array, "B N o"]:
        merged = self._subject.merge_params(params, frozen)
        loss = dataclasses.replace(self._subject.loss, is_training=False)
        denoise, _ = loss.make_denoise(merged, inputs.rows, jnp.int32(0))
        return denoise(jnp.asarray(inputs.noisy), jnp.asarray(inputs.time), None)[0]

    def _compute_change(self, params, frozen, inputs: _Inputs, reference: _Inputs, region) -> Float[Array, " B"]:
        expected = self._predict(params, frozen, reference)
        change = jnp.abs(self._predict(params, frozen, inputs) - expected).max(axis=-1)
        largest = jnp.where(region, change, 0).max(axis=1) / jnp.sqrt(jnp.square(expected).mean())
        return jnp.where(region.any(axis=1), largest, jnp.nan)

    def measure(self, change: _Change, region: Bool[np.ndarray, "B N"] | None = None) -> Float[np.ndarray, " _"]:
        """Return the change of the outputs in a region of each row, relative to their root mean square.

        Returns:
          The largest change of a token in the region of each row that has any, of all processes.
        """
        region = self.segments > 0 if region is None else region & (self.segments > 0)
        arguments = shard_batch((change(self._inputs), self._inputs, region), self._subject.trainer.mesh)
        values = np.asarray(self._compute(*self._params, *arguments))
        return values[~np.isnan(values)]

    @property
    def others(self) -> Bool[np.ndarray, "B N"]:
        """Return True for the tokens of all clips but the last one of each row."""
        return ~self.last & (self.segments > 0)


def _zero_positions(path: str, leaf: Array) -> Array:
    return 0 * leaf if re.search(POSITION_PATHS, path) else leaf


def check_model(subject: CheckedTraining, params: Any, rows: PackedBatch) -> list[Problem]:
    """Check what the outputs for each clip depend on.

    Args:
      subject: The training.
      params: Trained parameters without zeros.
      rows: A batch of this process.
    """
    probe = ModelProbe(subject, params, rows)
    problems = _check_isolation(probe) + _check_inputs(subject, probe)
    return problems + _check_mixing(subject, probe) + _check_positions(subject, params, rows)


def _change_tokens(where: Bool[np.ndarray, "B N"]) -> _Change:
    return lambda inputs: inputs._replace(noisy=np.where(where[..., None], 0.5 - inputs.noisy[..., ::-1], inputs.noisy))


def _change_time(where: Bool[np.ndarray, "B N"], by: float) -> _Change:
    return lambda inputs: inputs._replace(time=inputs.time + np.where(where, by, 0).astype(np.float32))


def change_text(rows: PackedBatch, where: Bool[np.ndarray, "B S"]) -> PackedBatch:
    """Return rows with other text at some places: ids are mirrored in the batch's range of ids."""
    text, is_text = np.asarray(rows.text), np.asarray(rows.text_segments) > 0
    if np.issubdtype(text.dtype, np.integer):
        used = text[is_text]
        return rows._replace(text=np.where(where & is_text, used.min() + used.max() - text, text))
    return rows._replace(text=np.where(where[..., None], 0.5 - text, text).astype(text.dtype))


def _check_isolation(probe: ModelProbe) -> list[Problem]:
    """Check that clips of a row do not depend on the last one, nor any clip on padding."""
    rows, others = probe.rows, probe.others
    text_segments = np.asarray(rows.text_segments)
    last_text = (text_segments == probe.segments.max(axis=1, keepdims=True)) & (text_segments > 0)
    problems = []
    changes: dict[str, tuple[str, _Change]] = {
        "tokens": ("segment_isolation", _change_tokens(probe.last)),
        "text": ("segment_isolation", lambda inputs: inputs._replace(rows=change_text(rows, last_text))),
        "time": ("time_conditioning", _change_time(probe.last, 0.2)),
    }
    for name, (check, change) in changes.items():
        leak = probe.measure(change, others)
        if leak.max(initial=0) > _UNCHANGED:
            problems.append(
                Problem(check, f"outputs of a clip depend on the {name} of another clip in its row ({leak.max():.1%})")
            )
    padding, text_padding = probe.segments == 0, text_segments == 0

    def fill_padding(inputs: _Inputs) -> _Inputs:
        text = np.asarray(rows.text)
        mask = text_padding if text.ndim == 2 else text_padding[..., None]
        text = np.where(mask, np.ones_like(text), text)
        noisy = np.where(padding[..., None], np.float32(3), inputs.noisy)
        return inputs._replace(noisy=noisy, rows=rows._replace(text=text))

    if (share := float(probe.measure(fill_padding).max(initial=0))) > _UNCHANGED:
        problems.append(Problem("padding", f"outputs of clips depend on padding ({share:.1%})"))
    return problems


def _check_inputs(subject: CheckedTraining, probe: ModelProbe) -> list[Problem]:
    """Check that the outputs of every clip depend on its text, its time and its known frames."""
    rows, everywhere = probe.rows, np.ones_like(probe.segments, bool)
    problems = []
    all_text = np.asarray(rows.text_segments) > 0
    for name, region in (("the last clip of a row", probe.last), ("other clips", probe.others)):
        change = probe.measure(lambda inputs: inputs._replace(rows=change_text(rows, all_text)), region)
        if change.min(initial=np.inf) <= _CHANGED:
            problems.append(Problem("text_conditioning", f"outputs of {name} do not depend on their text"))
        far, near, own = (
            probe.measure(_change_time(where, step), region).min(initial=np.inf)
            for where, step in ((everywhere, 0.2), (everywhere, _TIME_STEP), (region, 0.2))
        )
        message = f"outputs of {name} do not depend on their own time"
        if min(far, own) > _CHANGED:
            message = f"outputs of {name} hardly change with their time by {_TIME_STEP:g}: is it rounded or not scaled?"
        if min(far, own) <= _CHANGED or near <= max(_CHANGED, _MIN_TIME_RATIO * far if np.isfinite(far) else 0):
            problems.append(Problem("time_conditioning", message))
    return problems + _check_known_frames(subject, probe)


def _check_known_frames(subject: CheckedTraining, probe: ModelProbe) -> list[Problem]:
    """Check that a model with conditioning latents depends on them where frames are known."""
    loss, rows = subject.loss, probe.rows
    if loss.frame_conditioning is None or ConditioningLatents not in subject.model.backbone.conditioning_kinds:
        return []
    if len(masks := _draw_masks(subject, rows)) == 0:
        return []
    problems = [] if loss.frame_conditioning.has_mask_mix else _check_first_frames(subject, rows, masks)
    known = masks[0]
    has_known = known.any(axis=1)

    def change_unknown(inputs: _Inputs) -> _Inputs:
        tokens = np.asarray(rows.tokens)
        return inputs._replace(rows=rows._replace(tokens=np.where(known[..., None], tokens, 0.5 - tokens)))

    if probe.measure(change_unknown).max(initial=0) > _UNCHANGED:
        problems.append(Problem("frame_conditioning", "outputs depend on frames that are not known"))
    if not has_known.any():
        return problems

    def change(inputs: _Inputs) -> _Inputs:
        fields = dict(rows.fields)
        if COND_LATENTS in fields:
            fields[COND_LATENTS] = 0.5 - np.asarray(fields[COND_LATENTS])
        return inputs._replace(rows=rows._replace(tokens=0.5 - np.asarray(rows.tokens), fields=fields))

    if probe.measure(change, has_known[:, None] & (probe.segments > 0)).min(initial=np.inf) <= _CHANGED:
        problems.append(Problem("frame_conditioning", "outputs of clips with known frames do not depend on these"))
    return problems


def _draw_masks(subject: CheckedTraining, rows: PackedBatch) -> Bool[np.ndarray, "s B N"]:
    """Return which tokens are known at the first steps; none if other processes have rows of their own."""

    def draw(rows: PackedBatch) -> Bool[Array, "s B N"]:
        return jax.vmap(lambda step: subject.loss.draw_cond_mask(rows, step))(jnp.arange(_MASK_STEPS))

    masks = np.asarray(subject.jit(draw)(shard_batch(rows, subject.trainer.mesh)))
    return masks if masks.shape[1] == len(rows.segments) else masks[:0]


def _check_first_frames(subject: CheckedTraining, rows: PackedBatch, masks: Bool[np.ndarray, "s B N"]) -> list[Problem]:
    """Check that the first frame of clips with several is known, as often as the config says, and nothing else."""
    assert subject.loss.frame_conditioning is not None
    prob, segments = subject.loss.frame_conditioning.prob, np.asarray(rows.segments)
    is_first = np.asarray(rows.positions)[..., 0] == 0
    if masks[:, ~is_first | (segments == 0)].any():
        return [Problem("frame_conditioning", "other frames than the first one are known")]
    shares = []
    for row, segment in np.ndindex(len(segments), rows.layout.count):
        is_own = segments[row] == segment + 1
        if (is_own & ~is_first[row]).any():
            shares.append(masks[:, row, is_own & is_first[row]].all(axis=1).mean())
    error = 5 * np.sqrt(prob * (1 - prob) / max(1, _MASK_STEPS * len(shares)))
    if shares and abs(np.mean(shares) - prob) > error:
        return [Problem("frame_conditioning", f"{np.mean(shares):.0%} of the first frames are known, not {prob:.0%}")]
    return []


def _check_mixing(subject: CheckedTraining, probe: ModelProbe) -> list[Problem]:
    """Check that tokens of a clip depend on one another, in both directions unless attention is causal."""
    half = np.zeros_like(probe.segments, bool)
    for row, segment in np.ndindex(len(half), probe.rows.layout.count):
        places = np.flatnonzero(probe.segments[row] == segment + 1)
        half[row, places[: len(places) // 2]] = True
    is_causal = any(pattern.causal for pattern in subject.model.backbone.patterns)
    problems = []
    for name, source, region in (("earlier", half, ~half), ("later", ~half, half)):
        change = probe.measure(_change_tokens(source), region)
        if not (is_causal and name == "later") and change.min(initial=np.inf) <= _CHANGED:
            problems.append(Problem("token_mixing", f"outputs of tokens do not depend on {name} tokens of their clip"))
    return problems


def _check_positions(subject: CheckedTraining, params: Any, rows: PackedBatch) -> list[Problem]:
    """Check that attention depends on distances along each axis, and not on where all positions begin.

    Positions that are also embedded are left out, by zero weights; `trained_parameters` has these.
    """
    backbone = subject.model.backbone
    if getattr(backbone, "rotary", None) == "none":
        return []
    probe = ModelProbe(subject, params, rows, is_zeroed=True)
    layout = rows.layout
    positions = np.asarray(layout.positions, np.float32)
    problems = []

    def move(moved: Float[np.ndarray, "B N 3"]) -> _Change:
        changed = dataclasses.replace(layout, positions=moved.astype(np.float32))
        return lambda inputs: inputs._replace(rows=inputs.rows._replace(layout=changed))

    for axis, name in enumerate("thw"):
        is_extended = np.zeros_like(probe.segments, bool)
        for row, segment in np.ndindex(len(is_extended), layout.count):
            is_own = probe.segments[row] == segment + 1
            is_extended[row] |= is_own & (positions[row, is_own, axis].max(initial=0) > 0)
        halved = positions.copy()
        halved[..., axis] *= 0.5
        if probe.measure(move(halved), is_extended).min(initial=np.inf) <= _CHANGED:
            problems.append(Problem("positions", f"outputs do not depend on positions along {name}"))
    moved = positions + np.asarray([0, 3, 3], np.float32)  # the first frame stays the first one
    if probe.measure(move(moved)).max(initial=0) > 10 * _UNCHANGED:
        message = "outputs change if all positions are moved alike: are queries and keys rotated alike?"
        problems.append(Problem("positions", message))
    if backbone.rotary_embedding is not None:
        problems += _check_angles(positions.reshape(-1, 3), backbone.rotary_embedding)
    return problems


def _check_angles(positions: Float[np.ndarray, "n 3"], rotary: Rotary3d) -> list[Problem]:
    """Check rotary angles against their formula (arXiv 2104.09864), by which each axis has its own channels."""
    parts = []
    for axis, width in enumerate(rotary.split):
        stretch = rotary.stretch[axis] ** (width / (width - 2)) if width > 2 else 1.0
        frequencies = [(rotary.theta * stretch) ** (-2 * pair / width) for pair in range(width // 2)]
        parts.append(positions[:, axis, None] * rotary.scale[axis] * np.asarray(frequencies))
    angles = np.asarray(compute_rotary_angles(jnp.asarray(positions), rotary))
    if np.allclose(angles, np.concatenate(parts, axis=1), rtol=1e-3, atol=1e-3):
        return []
    return [Problem("positions", "the angles of the rotary embedding are not those of its split and frequencies")]


_CHANGE = 1e-3
"""Relative change of the loss that a finite difference aims at."""
_MIN_CHANGE = 5e-5
"""Relative change below which rounding of float32 hides the difference."""
_MAX_STEP = 1e-2
_TOLERANCE = 0.1
_MAX_LEAVES = 16
"""Number of parameters without a gradient for which the loss is computed again."""


class Gradient(NamedTuple):
    """A few values of the gradient of a batch."""

    values: Mapping[str, np.ndarray]
    """Values at the places of the reader, by path."""
    norm: float
    is_used: Mapping[str, np.ndarray]
    """Whether any value of a parameter's gradient is not zero; of stacked layers for each of them."""
    slope: float
    """Derivative of the loss in the direction of the signs of `values`."""


class GradientProbe:
    """The gradient of a training's loss, computed over the microbatches one after the other.

    Args:
      subject: The training.
      loss: Loss of the step, a function of the trained parameters.
      reader: Reader of the values.
    """

    def __init__(self, subject: CheckedTraining, loss: Any, reader: ValueReader, params: Any):
        self._subject, self._loss, self._reader = subject, loss, reader
        self._num_parts = subject.training.accumulation_steps
        layout = make_shardings(params, subject.trainer.mesh)
        self._differentiate = subject.jit(self._compute_part, (layout, subject.replicated))
        self._summarize = subject.jit(self._summarize_tree)
        self._evaluate = subject.jit(self._compute_loss)

    def compute(self, params: Any, rows: PackedBatch, step: int) -> Gradient:
        """Return the gradient of a batch of this process."""
        total, weight = None, 0.0
        for part in range(self._num_parts):
            arguments = params, self._subject.frozen_params, self._take_part(rows, part), np.int32(step)
            gradients, count = self._differentiate(*arguments)
            total = gradients if total is None else jax.tree.map(jnp.add, total, gradients)
            weight += float(count)
        values, norm, is_used, slope = jax.device_get(self._summarize(total, np.float32(max(weight, 1.0))))
        return Gradient(
            {path: np.asarray(each, np.float64) for path, each in values.items()}, float(norm), is_used, float(slope)
        )

    def evaluate(
        self, params: Any, rows: PackedBatch, step: int, signs: Mapping[str, np.ndarray], size: float, changed: str = ""
    ) -> float:
        """Return the loss at parameters that are moved by signs at the sampled places, with one of them changed."""
        flags = {path: np.float32(path == changed) for path in signs}
        values = {path: np.asarray(each, np.float32) for path, each in signs.items()}
        total, weight = 0.0, 0.0
        for part in range(self._num_parts):
            arguments = self._take_part(rows, part), np.int32(step), values, np.float32(size), flags
            loss, count = jax.device_get(self._evaluate(params, self._subject.frozen_params, *arguments))
            total += float(count) * float(loss)
            weight += float(count)
        return total / max(weight, 1.0)

    def compute_loss(self, params: Any, rows: PackedBatch, step: int) -> float:
        """Return the loss of a batch of this process."""
        signs = {path: np.zeros(COUNT if leaf.ndim else (), np.float32) for path, leaf in flatten(params).items()}
        return self.evaluate(params, rows, step, signs, 0.0)

    def _take_part(self, rows: PackedBatch, part: int) -> PackedBatch:
        """Return a microbatch on the devices."""
        microbatch = jax.tree.map(lambda leaf: np.asarray(leaf)[part :: self._num_parts], rows)
        return shard_batch(microbatch, self._subject.trainer.mesh)

    def _compute_part(self, params, frozen, rows, step):
        """Return the gradient of a microbatch, times its number of clips, and that number."""
        gradients = jax.grad(lambda each: self._loss(each, rows, step, *frozen)[0])(params)
        count = jnp.asarray(rows.valid).sum().astype(jnp.float32)
        return jax.tree.map(lambda leaf: count * leaf.astype(jnp.float32), gradients), count

    def _summarize_tree(self, total, weight):
        gradients = jax.tree.map(lambda leaf: leaf / weight, total)
        values = self._reader.take(gradients)
        direction = self._reader.scatter(gradients, {path: jnp.sign(each) for path, each in values.items()})
        slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True))
        norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients)))
        return values, norm, {path: _is_used(path, leaf) for path, leaf in flatten(gradients).items()}, slope

    def _compute_loss(self, params, frozen, rows, step, signs, size, flags):
        """Return the loss at moved parameters, and the number of clips."""
        direction = flatten(self._reader.scatter(params, signs))

        def move(path: str, leaf: Array) -> Array:
            noise = flags[path] * NOISE * make_noise(f"{path}, moved", leaf.shape)
            return (leaf + size * direction[path] + noise).astype(leaf.dtype)

        return self._loss(map_with_path(move, params), rows, step, *frozen)[0], jnp.asarray(rows.valid).sum()


def _is_used(path: str, gradient: Array) -> Bool[Array, "*layers"]:
    is_stacked = re.search(DEFAULT_RULES.stacked_pattern, path) and gradient.ndim > 1
    return (gradient != 0).any(axis=tuple(range(1 if is_stacked else 0, gradient.ndim)))


def check_gradient(
    subject: CheckedTraining, probe: GradientProbe, params: Any, rows: PackedBatch
) -> tuple[list[Problem], Mapping[str, bool]]:
    """Check the gradient of a batch of this process, at parameters without zeros.

    Returns:
      The problems, and whether the loss depends on each parameter.
    """
    gradient = probe.compute(params, rows, 0)
    signs = {path: np.sign(each) for path, each in gradient.values.items()}
    loss = probe.evaluate(params, rows, 0, signs, 0.0)
    problems = []
    is_adapter = subject.trained.lora is not None
    used = {path: bool(is_used.any()) for path, is_used in gradient.is_used.items()}
    trained = [path for path in used if subject.is_trained(path)]
    idle = [path for path in trained if not used[path]]
    for path in trained:
        if used[path] and not gradient.is_used[path].all():
            layers = np.flatnonzero(~gradient.is_used[path]).tolist()
            problems.append(Problem("gradient", f"layers {layers} of {path} have no gradient"))
    for path in idle[:_MAX_LEAVES]:
        if probe.evaluate(params, rows, 0, signs, 0.0, path) != loss:
            problems.append(Problem("gradient", f"the loss depends on {path}, but its gradient is zero"))
            used[path] = True
        else:
            check = "adapter" if is_adapter else "trained_parameters"
            problems.append(Problem(check, f"{path} is trained, but the loss does not depend on it"))
    if subject.model.backbone.dtype == "float32" and gradient.slope > 0:
        size = min(_MAX_STEP, _CHANGE * abs(loss) / (2 * gradient.slope))
        expected = 2 * size * gradient.slope
        if expected > _MIN_CHANGE * abs(loss):
            actual = probe.evaluate(params, rows, 0, signs, size) - probe.evaluate(params, rows, 0, signs, -size)
            if abs(actual / expected - 1) > _TOLERANCE:
                message = f"the loss changes by {actual:.3g} where its gradient says {expected:.3g}"
                problems.append(Problem("gradient", message))
    return problems, used
