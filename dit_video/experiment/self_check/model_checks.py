"""Checks of the model: which of its inputs each output depends on.

Clips of a row must not see one another, and each must see its own tokens, text, time and positions. A new model
depends on nothing, as the weights of its gates and its head are zero; so small weights get random values first.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dit_video.conditioning import COND_LATENTS, ConditioningLatents
from dit_video.core.trees import map_with_path
from dit_video.experiment.self_check.problems import Problem
from dit_video.experiment.self_check.subject import CheckedTraining
from dit_video.tokens import PackedBatch, expand_to_tokens

SMALL = 0.02
"""Root mean square of a parameter below which it gets random values."""
NOISE = 0.05
"""Standard deviation of these values."""
_UNCHANGED = 1e-3
"""Largest change of an output, relative to its root mean square, that counts as rounding. Matrix products in bfloat16
round by 0.004, but equal inputs are rounded alike."""
_CHANGED = 1e-6
"""Smallest change that counts as one."""
_TIMES = 0.7, 0.3
_TIME_STEP = 7e-4
"""Difference of two times that bfloat16, and times in whole thousandths, cannot tell apart."""


def perturb(params: dict[str, Any], key: Array, amount: Float[Array, ""]) -> dict[str, Any]:
    """Return parameters whose small ones have random values added, `amount` times as large as `NOISE`. Traceable."""

    def add(path: str, leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        noise = NOISE * jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape, jnp.float32)
        is_small = jnp.sqrt(jnp.square(leaf.astype(jnp.float32)).mean()) < SMALL
        return (leaf + jnp.where(is_small, amount, 0) * noise).astype(leaf.dtype)

    return map_with_path(add, params)


class _Inputs(NamedTuple):
    """Inputs of the model that a check changes."""

    rows: PackedBatch
    noisy: Float[Array, "B N p"]
    time: Float[Array, "B N"]


class ModelProbe:
    """The model with perturbed parameters, on one batch."""

    def __init__(self, subject: CheckedTraining, params: Any, rows: PackedBatch):
        self._subject, self._params, self.rows = subject, params, rows
        key = jax.random.key(subject.experiment.seed)
        self.segments = jnp.asarray(rows.segments)
        self.last = self.segments == self.segments.max(axis=1, keepdims=True)
        """True for the tokens of the last clip of each row."""
        self.has_several = self.segments.max(axis=1) > 1
        time = jnp.where(self.last, *_TIMES)
        noisy = jax.random.normal(jax.random.fold_in(key, 1), jnp.shape(rows.tokens))
        self._inputs = _Inputs(rows, jnp.where((self.segments > 0)[..., None], noisy, 0), time)
        self._compute = subject.jit(self._predict)
        self._measure = subject.jit(_measure_change)
        self._output = self._call(self._inputs)

    def _predict(self, params, frozen, inputs: _Inputs) -> Float[Array, "B N o"]:
        subject = self._subject
        merged = subject.merge_params(params, frozen)
        perturbed = perturb(merged, jax.random.key(subject.experiment.seed), jnp.float32(1))
        denoise, _ = subject.loss.make_denoise(perturbed, inputs.rows, jnp.int32(0))
        return denoise(inputs.noisy, inputs.time, None)[0]

    def _call(self, inputs: _Inputs) -> Float[Array, "B N o"]:
        return self._compute(self._params, self._subject.frozen_params, inputs)

    def measure(
        self, change: Callable[[_Inputs], _Inputs], region: Bool[Array, "B N"] | None = None
    ) -> Float[np.ndarray, " B"]:
        """Return the change of the outputs in a region of each row, relative to their root mean square.

        Returns:
          The largest change of a token of each row; NaN for rows without tokens in the region.
        """
        region = self.segments > 0 if region is None else region & (self.segments > 0)
        return np.asarray(self._measure(self._call(change(self._inputs)), self._output, region))

    @property
    def others(self) -> Bool[Array, "B N"]:
        """Return True for the tokens of all clips but the last one of each row."""
        return ~self.last & (self.segments > 0)


def _measure_change(
    output: Float[Array, "B N o"], reference: Float[Array, "B N o"], region: Bool[Array, "B N"]
) -> Float[Array, " B"]:
    scale = jnp.sqrt(jnp.square(reference).mean())
    change = jnp.abs(output - reference).max(axis=-1) / scale
    return jnp.where(region.any(axis=1), jnp.where(region, change, 0).max(axis=1), jnp.nan)


def check_model(subject: CheckedTraining, params: Any, rows: PackedBatch) -> list[Problem]:
    """Check what the outputs for each clip depend on.

    Args:
      subject: The training.
      params: Trained parameters.
      rows: A batch on the devices.
    """
    probe = ModelProbe(subject, params, rows)
    problems = _check_isolation(probe) + _check_inputs(subject, probe)
    return problems + _check_mixing(subject, probe) + _check_positions(subject, probe)


def _change_tokens(where: Bool[Array, "B N"]) -> Callable[[_Inputs], _Inputs]:
    return lambda inputs: inputs._replace(
        noisy=jnp.where(where[..., None], 0.5 - inputs.noisy[..., ::-1], inputs.noisy)
    )


def _change_time(where: Bool[Array, "B N"], by: float) -> Callable[[_Inputs], _Inputs]:
    return lambda inputs: inputs._replace(time=inputs.time + jnp.where(where, by, 0))


def change_text(rows: PackedBatch, where: Bool[Array, "B S"]) -> PackedBatch:
    """Return rows with other text at some places: ids are mirrored in the range of those of the batch."""
    text = jnp.asarray(rows.text)
    if jnp.issubdtype(text.dtype, jnp.integer):
        is_text = jnp.asarray(rows.text_segments) > 0
        low = jnp.where(is_text, text, jnp.iinfo(text.dtype).max).min()
        high = jnp.where(is_text, text, jnp.iinfo(text.dtype).min).max()
        return rows._replace(text=jnp.where(where & is_text, low + high - text, text))
    return rows._replace(text=jnp.where(where[..., None], 0.5 - text, text))


def _check_isolation(probe: ModelProbe) -> list[Problem]:
    """Check that clips of a row do not depend on the last one, nor any clip on padding."""
    rows, others = probe.rows, probe.others
    text_segments = jnp.asarray(rows.text_segments)
    last_text = (text_segments == probe.segments.max(axis=1, keepdims=True)) & (text_segments > 0)
    problems = []
    changes: dict[str, tuple[str, Callable[[_Inputs], _Inputs]]] = {
        "tokens": ("segment_isolation", _change_tokens(probe.last)),
        "text": ("segment_isolation", lambda inputs: inputs._replace(rows=change_text(rows, last_text))),
        "time": ("time_conditioning", _change_time(probe.last, 0.2)),
    }
    for name, (check, change) in changes.items():
        leak = probe.measure(change, others)
        if np.nanmax(leak, initial=0) > _UNCHANGED:
            problems.append(
                Problem(
                    check, f"outputs of a clip depend on the {name} of another clip in its row ({np.nanmax(leak):.1%})"
                )
            )
    padding, text_padding = probe.segments == 0, text_segments == 0

    def fill_padding(inputs: _Inputs) -> _Inputs:
        text = jnp.asarray(rows.text)
        mask = text_padding if text.ndim == 2 else text_padding[..., None]
        text = jnp.where(mask, jnp.ones_like(text), text)
        noisy = jnp.where(padding[..., None], 3.0, inputs.noisy)
        return inputs._replace(noisy=noisy, rows=rows._replace(text=text))

    if (share := float(np.nanmax(probe.measure(fill_padding), initial=0))) > _UNCHANGED:
        problems.append(Problem("padding", f"outputs of clips depend on padding ({share:.1%})"))
    return problems


def _check_inputs(subject: CheckedTraining, probe: ModelProbe) -> list[Problem]:
    """Check that the outputs of every clip depend on its text, its time and its known frames."""
    rows, everywhere = probe.rows, jnp.ones_like(probe.segments, bool)
    problems = []
    all_text = jnp.asarray(rows.text_segments) > 0
    for name, region in (("the last clip of a row", probe.last), ("other clips", probe.others)):
        change = probe.measure(lambda inputs: inputs._replace(rows=change_text(rows, all_text)), region)
        if np.nanmin(change, initial=np.inf) <= _CHANGED:
            problems.append(Problem("text_conditioning", f"outputs of {name} do not depend on their text"))
        for step, note in ((0.2, ""), (_TIME_STEP, f" by {_TIME_STEP:g}: are times rounded?")):
            change = probe.measure(_change_time(everywhere, step), region)
            if np.nanmin(change, initial=np.inf) <= _CHANGED:
                message = f"outputs of {name} do not change with their time{note}"
                problems.append(Problem("time_conditioning", message))
                break
    return problems + _check_known_frames(subject, probe)


def _check_known_frames(subject: CheckedTraining, probe: ModelProbe) -> list[Problem]:
    """Check that a model with conditioning latents depends on them where frames are known."""
    loss, rows = subject.loss, probe.rows
    if (
        loss.frame_conditioning is None
        or ConditioningLatents not in subject.experiment.denoiser.backbone.conditioning_kinds
    ):
        return []
    known = np.asarray(subject.jit(lambda rows: loss.draw_cond_mask(rows, jnp.int32(0)))(rows))
    has_known = known.any(axis=1)
    if not has_known.any():
        return []

    def change(inputs: _Inputs) -> _Inputs:
        tokens, fields = jnp.asarray(rows.tokens), dict(rows.fields)
        if COND_LATENTS in fields:
            fields[COND_LATENTS] = 0.5 - jnp.asarray(fields[COND_LATENTS])
        return inputs._replace(rows=rows._replace(tokens=0.5 - tokens, fields=fields))

    if probe.measure(change)[has_known].min() <= _CHANGED:
        return [Problem("frame_conditioning", "outputs of clips with known frames do not depend on these")]
    return []


def _check_mixing(subject: CheckedTraining, probe: ModelProbe) -> list[Problem]:
    """Check that tokens of a clip depend on one another, in both directions unless attention is causal."""
    offsets = probe.rows.layout.compute_offsets()
    counts = jax.vmap(lambda ids: jnp.bincount(ids, length=probe.rows.layout.count + 1))(probe.segments)
    half = offsets < expand_to_tokens(counts[:, 1:], probe.segments) // 2
    is_causal = any(pattern.causal for pattern in subject.experiment.denoiser.backbone.patterns)
    problems = []
    for name, source, region in (("earlier", half, ~half), ("later", ~half, half)):
        change = probe.measure(_change_tokens(source), region)
        if not (is_causal and name == "later") and np.nanmin(change, initial=np.inf) <= _CHANGED:
            problems.append(Problem("token_mixing", f"outputs of tokens do not depend on {name} tokens of their clip"))
    return problems


def _check_positions(subject: CheckedTraining, probe: ModelProbe) -> list[Problem]:
    """Check that outputs depend on distances along each axis, and not on where all positions begin."""
    layout, backbone = probe.rows.layout, subject.experiment.denoiser.backbone
    positions = jnp.asarray(layout.positions)
    problems = []

    def move(moved: Float[Array, "B N 3"]) -> Callable[[_Inputs], _Inputs]:
        changed = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(layout), [layout.segments, moved])
        return lambda inputs: inputs._replace(rows=inputs.rows._replace(layout=changed))

    for axis, name in enumerate("thw"):
        extended = layout.expand(layout.max(positions[..., axis])) > 0
        if not bool((extended & (probe.segments > 0)).any()):
            continue
        swapped = positions.at[..., axis].multiply(0.5)
        change = probe.measure(move(swapped), extended)
        if np.nanmin(change, initial=np.inf) <= _CHANGED:
            problems.append(Problem("positions", f"outputs do not depend on positions along {name}"))
    if getattr(backbone, "absolute_position", None) is None:
        shift = probe.measure(move(positions + 3.0))
        if np.nanmax(shift, initial=0) > 10 * _UNCHANGED:
            message = "outputs change if all positions are moved alike: are queries and keys rotated alike?"
            problems.append(Problem("positions", message))
    return problems
