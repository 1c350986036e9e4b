"""Plans of sampling, which generation tasks make: fields, start latents, and changes of steps."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dit_video.diffusion import Process
from dit_video.tokens import Field, PackedBatch

CLEAN_LATENTS, CLEAN_MASK = "clean_latents", "clean_mask"
"""Names of the fields with clean latents `t h w c`, and with 1 where they are clean, `t h w 1`."""


class StepInputs(NamedTuple):
    """The point in time of a transform, and the batch that is sampled."""

    rows: PackedBatch
    """Rows of the first branch of guidance, with the fields of the task."""
    process: Process
    time: Float[Array, ""]
    """Diffusion time of the sample."""
    noise: Float[Array, "B N p"]
    """Standard normal noise of the step, of each clip by its seed; a stochastic sampler draws the same."""


class StepTransform(abc.ABC):
    """A change of each sampling step, as a frozen dataclass: it is a part of the compiled program.

    Values that differ between requests are fields of their plans (`rows.fields`). Fields are zero in requests that do
    not have them, and must then change nothing.
    """

    @abc.abstractmethod
    def list_fields(self, channels: int) -> tuple[Field, ...]:
        """Return the fields of the plans, for latents of this many channels."""

    def change_input(
        self, noisy: Float[Array, "B N p"], times: Float[Array, "B N"], rows: PackedBatch, process: Process
    ) -> tuple[Float[Array, "B N p"], Float[Array, "B N"]]:
        """Return the tokens and their times as the model gets them."""
        return noisy, times

    def change_sample(self, sample: Float[Array, "B N p"], inputs: StepInputs) -> Float[Array, "B N p"]:
        """Return the sample after a step; `inputs.time` is that at its end."""
        return sample


class SamplingPlan(NamedTuple):
    """Everything that sampling of a clip needs to know besides its prompt."""

    fields: Mapping[Field, np.ndarray] = {}
    """Fields of the clip, which the model or `transform` reads; an array on the latents' grid is `t h w *shape`."""
    start: Float32[np.ndarray, "t h w c"] | None = None
    """Latents that sampling starts from, with noise of `start_time` added; None to start from noise alone."""
    start_time: float = 1.0
    """Diffusion time that sampling starts at: at the first time of the schedule that is not above it."""
    transform: StepTransform | None = None
    """Change of each step; clips with equal ones are sampled together."""


@dataclass(frozen=True, kw_only=True)
class CleanTokens(StepTransform):
    """Latents that a model with a time per token sees clean, at time 0, and that are not changed."""

    def list_fields(self, channels: int) -> tuple[Field, ...]:
        return (
            Field(name=CLEAN_LATENTS, alignment="grid", shape=(channels,)),
            Field(name=CLEAN_MASK, alignment="grid", shape=(1,)),
        )

    def change_input(
        self, noisy: Float[Array, "B N p"], times: Float[Array, "B N"], rows: PackedBatch, process: Process
    ) -> tuple[Float[Array, "B N p"], Float[Array, "B N"]]:
        """Put clean tokens in place, at time 0."""
        is_clean = rows.fields[CLEAN_MASK][..., :1] > 0
        clean = process.input_scale(jnp.zeros(())) * rows.fields[CLEAN_LATENTS]
        return jnp.where(is_clean, clean, noisy), jnp.where(is_clean[..., 0], 0.0, times)

    def change_sample(self, sample: Float[Array, "B N p"], inputs: StepInputs) -> Float[Array, "B N p"]:
        """Restore the clean tokens."""
        fields = inputs.rows.fields
        return jnp.where(fields[CLEAN_MASK][..., :1] > 0, fields[CLEAN_LATENTS], sample)
