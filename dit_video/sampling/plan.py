"""Plans of sampling, which generation tasks make: fields, start latents, and changes of steps."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8

from dit_video.diffusion import Process
from dit_video.tokens import Field, PackedBatch

CLEAN_LATENTS, CLEAN_MASK = "clean_latents", "clean_mask"
"""Names of the fields with clean latents `t h w c`, and with 1 where they are clean, `t h w 1`."""
HELD_LATENTS, HELD_STRENGTH = "held_latents", "held_strength"
"""Names of the fields with held latents `t h w c`, and with their strength `t h w 1`, 0 where there are none."""
TIME_TOLERANCE = 1e-6
"""Rounding of times, within which a held latent is released and begins to be denoised."""


def make_latent_fields(latents: str, mask: str, *, channels: int) -> tuple[Field, Field]:
    """Return the fields of these names with latents `t h w c`, and with their mask or strength `t h w 1`."""
    return Field(name=latents, alignment="grid", shape=(channels,)), Field(name=mask, alignment="grid", shape=(1,))


class StepInputs(NamedTuple):
    """The point in time of a transform, and the batch that is sampled."""

    rows: PackedBatch
    """Rows of the first branch of guidance, with the fields of the task."""
    process: Process
    time: Float[Array, ""]
    """Diffusion time of the sample."""
    noise: Float[Array, "B N p"]
    """Standard normal noise of the step, of each clip by its seed; a stochastic sampler draws the same."""
    start: Float[Array, ""]
    """Model time at the start of the step."""


class StepTransform(abc.ABC):
    """A change of each sampling step, as a frozen dataclass: it is a part of the compiled program.

    Values that differ between requests are fields of their plans (`rows.fields`). Fields are zero in requests that do
    not have them, and must then change nothing.
    """

    @abc.abstractmethod
    def list_fields(self, channels: int) -> tuple[Field, ...]:
        """Return the fields of the plans, for latents of this many channels."""

    def change_start(self, noisy: Float[Array, "B N p"], rows: PackedBatch) -> Float[Array, "B N p"]:
        """Return the sample before the first step, from noise or noisy start latents."""
        return noisy

    def change_input(
        self, noisy: Float[Array, "B N p"], times: Float[Array, "B N"], rows: PackedBatch, process: Process
    ) -> tuple[Float[Array, "B N p"], Float[Array, "B N"]]:
        """Return the tokens and their times as the model gets them."""
        return noisy, times

    def get_clean_tokens(self, rows: PackedBatch) -> Bool[Array, "B N"] | None:
        """Return the tokens that `change_input` puts at time 0, if it changes no other times; None if it may."""
        return None

    def change_sample(self, sample: Float[Array, "B N p"], inputs: StepInputs) -> Float[Array, "B N p"]:
        """Return the sample after a step; `inputs.time` is that at its end."""
        return sample


class BlockEnd(NamedTuple):
    """The point in time after a block of steps of a clip."""

    number: int
    """Number of steps that are done."""
    time: float
    """Diffusion time of the sample."""
    process: Process
    data: Float32[np.ndarray, "t h w c"]
    """Data that the block's steps lead to."""
    noise: Float32[np.ndarray, "t h w c"]
    """Noise that they come from: the sample is both, in the process's proportions."""

    def combine(
        self, data: Float32[np.ndarray, "t h w c"], noise: Float32[np.ndarray, "t h w c"]
    ) -> Float32[np.ndarray, "t h w c"]:
        """Return the sample of data and noise at its time."""
        time = jnp.asarray(self.time, jnp.float32)
        return np.asarray(self.process.add_noise(jnp.asarray(data), jnp.asarray(noise), time))


class LatentUpdate(abc.ABC):
    """A change of a clip's latents after every block of steps, on the host, where it may decode and encode them."""

    @abc.abstractmethod
    def __call__(self, latents: Float32[np.ndarray, "t h w c"], end: BlockEnd) -> Float32[np.ndarray, "t h w c"]:
        """Return the changed latents of the sample."""


class DecodingChange(abc.ABC):
    """A change of what is decoded, where a clip needs more latents around its own than are sampled."""

    @abc.abstractmethod
    def list_frames(self, count: int) -> list[int]:
        """Return the numbers of the latent frames that are decoded, of `count` sampled ones."""

    @abc.abstractmethod
    def cut(self, frames: UInt8[np.ndarray, "_ H W 3"]) -> UInt8[np.ndarray, "T H W 3"]:
        """Return the clip of their frames, as long as if the sampled latents were decoded."""


class ExtraTokens(NamedTuple):
    """Tokens that are sampled with those of a clip, such as keyframes, and cut off from the result."""

    noise: Float32[np.ndarray, "m p"]
    """Their initial noise."""
    positions: Float32[np.ndarray, "m 3"]
    """Their positions, in the units of those of the clip's tokens."""
    fields: Mapping[Field, np.ndarray]
    """Their values `m *shape` of fields as rows have them; zero for other fields."""


FrameChange = Callable[[UInt8[np.ndarray, "T H W 3"]], UInt8[np.ndarray, "T H W 3"]]
"""A change of a clip's decoded frames."""


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
    leading_frames: int = 0
    """Number of latent frames before the clip's own that are sampled with them and then cut off, such as those of
    reference images; fields and start latents have them too."""
    extra: ExtraTokens | None = None
    """Further tokens, for models of packed rows."""
    resample: int = 1
    """Number of times that every block of steps is taken; noise leads back to its first time."""
    update: LatentUpdate | None = None
    """Change of the latents between blocks of steps."""
    decoding: DecodingChange | None = None
    """Change of what is decoded."""
    finish: FrameChange | None = None
    """Change of the decoded frames, which puts known pixels in their places."""
    method: str = ""
    """Way in which known pixels are kept, `trained`, `training_free` or both; empty if there are none."""


@dataclass(frozen=True, kw_only=True)
class TransformSequence(StepTransform):
    """Several transforms, one after the other."""

    transforms: tuple[StepTransform, ...]

    def list_fields(self, channels: int) -> tuple[Field, ...]:
        return tuple(dict.fromkeys(field for each in self.transforms for field in each.list_fields(channels)))

    def change_start(self, noisy: Float[Array, "B N p"], rows: PackedBatch) -> Float[Array, "B N p"]:
        for each in self.transforms:
            noisy = each.change_start(noisy, rows)
        return noisy

    def change_input(
        self, noisy: Float[Array, "B N p"], times: Float[Array, "B N"], rows: PackedBatch, process: Process
    ) -> tuple[Float[Array, "B N p"], Float[Array, "B N"]]:
        for each in self.transforms:
            noisy, times = each.change_input(noisy, times, rows, process)
        return noisy, times

    def change_sample(self, sample: Float[Array, "B N p"], inputs: StepInputs) -> Float[Array, "B N p"]:
        for each in self.transforms:
            sample = each.change_sample(sample, inputs)
        return sample


@dataclass(frozen=True, kw_only=True)
class CleanTokens(StepTransform):
    """Latents that a model with a time per token sees clean, at time 0, and that are not changed."""

    def list_fields(self, channels: int) -> tuple[Field, ...]:
        return make_latent_fields(CLEAN_LATENTS, CLEAN_MASK, channels=channels)

    def change_input(
        self, noisy: Float[Array, "B N p"], times: Float[Array, "B N"], rows: PackedBatch, process: Process
    ) -> tuple[Float[Array, "B N p"], Float[Array, "B N"]]:
        """Put clean tokens in place, at time 0."""
        is_clean = self.get_clean_tokens(rows)
        clean = process.input_scale(jnp.zeros(())) * rows.fields[CLEAN_LATENTS]
        return jnp.where(is_clean[..., None], clean, noisy), jnp.where(is_clean, 0.0, times)

    def get_clean_tokens(self, rows: PackedBatch) -> Bool[Array, "B N"]:
        return jnp.asarray(rows.fields[CLEAN_MASK]).min(axis=-1) > 0

    def change_sample(self, sample: Float[Array, "B N p"], inputs: StepInputs) -> Float[Array, "B N p"]:
        """Restore the clean tokens."""
        is_clean = self.get_clean_tokens(inputs.rows)[..., None]
        return jnp.where(is_clean, inputs.rows.fields[CLEAN_LATENTS], sample)


@dataclass(frozen=True, kw_only=True)
class HeldTokens(StepTransform):
    """Latents with a strength, which a model with a time per token sees with the share `1 - strength` of noise.

    They are held, at the time `1 - strength`, until the sample's time falls to it, and are denoised with the others
    from then on. So a strength of 1 keeps them (LTX-Video, arXiv 2501.00103; `LTXConditionPipeline` of diffusers).
    """

    noise_scale: float = 0.0
    """Noise that the model sees in latents of strength 1, in units of the squared time. It helps motion to begin."""

    def list_fields(self, channels: int) -> tuple[Field, ...]:
        return make_latent_fields(HELD_LATENTS, HELD_STRENGTH, channels=channels)

    def change_start(self, noisy: Float[Array, "B N p"], rows: PackedBatch) -> Float[Array, "B N p"]:
        """Put the held latents in place."""
        is_held = jnp.asarray(rows.fields[HELD_STRENGTH])[..., :1] > 0
        return jnp.where(is_held, self._compute_held(rows, jnp.asarray(rows.tokens), jnp.ones(())), noisy)

    def change_input(
        self, noisy: Float[Array, "B N p"], times: Float[Array, "B N"], rows: PackedBatch, process: Process
    ) -> tuple[Float[Array, "B N p"], Float[Array, "B N"]]:
        """Limit the times of held latents."""
        return noisy, jnp.minimum(times, 1 - rows.fields[HELD_STRENGTH][..., 0])

    def change_sample(self, sample: Float[Array, "B N p"], inputs: StepInputs) -> Float[Array, "B N p"]:
        """Restore the latents that were held in this step."""
        strength = inputs.rows.fields[HELD_STRENGTH][..., :1]
        is_held = (strength > 0) & (inputs.start > 1 - strength + TIME_TOLERANCE)
        return jnp.where(is_held, self._compute_held(inputs.rows, inputs.noise, inputs.time), sample)

    def _compute_held(
        self, rows: PackedBatch, noise: Float[Array, "B N p"], time: Float[Array, ""]
    ) -> Float[Array, "B N p"]:
        strength, latents = jnp.asarray(rows.fields[HELD_STRENGTH])[..., :1], jnp.asarray(rows.fields[HELD_LATENTS])
        seen = latents + self.noise_scale * jnp.square(time) * noise
        return jnp.where(strength == 1, seen, strength * latents + (1 - strength) * rows.tokens)
