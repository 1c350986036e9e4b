"""The loss of a text-conditioned denoiser on packed rows."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from dit_video.backbones.denoise import packed_denoise
from dit_video.backbones.dit import DitConfig, Given
from dit_video.backbones.wan import WanDitConfig
from dit_video.conditioning import KnownFrames, drop_captions, given_latents, known_tokens
from dit_video.core.rng import example_keys, key
from dit_video.core.typing import AnyArray
from dit_video.diffusion import ClipSize, Objective, low_discrepancy
from dit_video.tokens import Rows, packed_noise, positions, segment_max, segment_mean, to_tokens
from dit_video.training.optim.optimizer import OptimizerConfig, hold_still
from dit_video.training.step import Figures, Ratio

TEMPORAL = r"(^|/)temporal"
"""paths of the layers that mix frames alone"""


@dataclass(frozen=True, kw_only=True)
class DenoiserLoss:
    """Mean over the clips of a batch of each clip's mean squared error.

    The metrics are `padding`, the share of tokens that are no clip's, `masked`, the share of clips that could not be
    read and do not count, and the loss by diffusion times, `loss_t0-0.25` and so on. Parameters are `{"dit": ...,
    "text": ...}`: the text encoder is trained with the denoiser, unless it is a frozen one, which has none: then rows
    hold its embeddings; or captions are classes (`ClassNames`).
    """

    dit: nnx.GraphDef
    text: nnx.GraphDef
    objective: Objective
    caption_dropout: float
    empty_caption: Shaped[np.ndarray, "s *E"]
    """the tokens of an empty caption, or their embeddings"""
    seed: int
    known: KnownFrames | None = None
    """For a model that is told what is known of a clip: by given latents beside the noisy ones, or, where each token
    has its own time, by time 0. Tokens at time 0 hold no noise, and do not count in the loss. An image encoder's tokens
    of the first frame are those that rows hold, where it is known, and zero where it is not."""
    shares: tuple[float, float] = (0.0, 1.0)
    """which of the objective's times, by the shares of them that are lower: of a model for some times, such as one of
    two experts, those between; see `share_below`"""
    times_of: Literal["clip", "frame"] = "clip"
    """what has a diffusion time of its own; frames have it where tokens may (`time="token"`)"""
    optimizer: OptimizerConfig | None = None
    """the loss is constant in the parameters that it does not train"""
    bins: int = 4
    """of equal widths, into which the times are divided for the loss by times"""

    def weight(self, rows: Rows) -> Float[Array, ""]:
        """How many clips count."""
        return jnp.asarray(rows.valid).sum().astype(jnp.float32)

    def __call__(self, params, rows: Rows, step: Array) -> tuple[Float[Array, ""], Figures]:
        count = rows.examples.shape[1]
        noise = packed_noise(rows, example_keys(key(self.seed, "noise"), step, rows.examples))
        keys = example_keys(key(self.seed, "caption dropout"), step, rows.examples)
        drop = jax.vmap(jax.vmap(jax.random.uniform))(keys) < self.caption_dropout
        text, text_segments = drop_captions(rows.text, rows.text_segments, drop, empty=self.empty_caption)

        params = params if self.optimizer is None else hold_still(self.optimizer, params)
        dit = nnx.merge(self.dit, params["dit"])
        known = self.known_tokens(rows, step)
        context = nnx.merge(self.text, params["text"])(text, text_segments)
        denoise = packed_denoise(
            dit,
            segments=rows.segments,
            coordinates=rows.coordinates,
            context=context.values,
            context_segments=context.segments,
            count=count,
            given=_given(dit.config, rows, known, count=count)._replace(labels=context.classes(count)),
        )
        clean = known if dit.config.time == "token" else None
        data, time = jnp.asarray(rows.tokens), self.token_times(rows, step)
        per_token = self.objective.loss(denoise, data, noise, time, known=clean)
        counted = rows.segments if clean is None else jnp.where(clean, 0, rows.segments)
        per_example = segment_mean(per_token, counted, count=count)
        placed = rows.segments.max(axis=1).sum()
        metrics = {
            "padding": (rows.segments == 0).mean(axis=(0, 1)),
            "masked": Ratio(placed - rows.valid.sum(), placed),
            **self.by_time(per_token, time, counted, rows.valid),
        }
        return (per_example * rows.valid).sum() / jnp.maximum(rows.valid.sum(), 1), metrics

    def by_time(
        self,
        per_token: Float[Array, "B N"],
        time: Float[Array, "B N"],
        counted: Int[AnyArray, "B N"],
        valid: Bool[AnyArray, "B G"],
    ) -> dict[str, Ratio]:
        """The loss of the clips at times in each bin; of a clip whose frames are in several, their shares of it."""
        member = counted[..., None] == jnp.arange(1, valid.shape[1] + 1)
        weight = jnp.where(member, (valid / jnp.maximum(member.sum(axis=1), 1))[:, None], 0).sum(axis=-1)
        place = jnp.clip(jnp.floor(time * self.bins), 0, self.bins - 1)
        found = {}
        for index in range(self.bins):
            inside = jnp.where(place == index, weight, 0)
            name = f"loss_t{index / self.bins:g}-{(index + 1) / self.bins:g}"
            found[name] = Ratio((inside * jax.lax.stop_gradient(per_token)).sum(), inside.sum())
        return found

    def known_tokens(self, rows: Rows, step: Array) -> Bool[Array, "B N"]:
        """What is known: of an example the same on any mesh."""
        if self.known is None:
            return jnp.zeros(rows.segments.shape, bool)
        keys = example_keys(key(self.seed, "known frames"), step, rows.examples)
        known = jax.vmap(jax.vmap(jax.random.uniform))(keys) < self.known.chance
        return known_tokens(rows.segments, rows.coordinates, known)

    def times(self, rows: Rows, step: Array) -> Float[Array, "B G"]:
        """Diffusion times, evenly spread over consecutive ranks of the plan."""
        offset = jax.random.uniform(jax.random.fold_in(key(self.seed, "time"), step))
        return self.objective.time(self._shared(low_discrepancy(offset, rows.examples)), clip_sizes(rows))

    def token_times(self, rows: Rows, step: Array) -> Float[Array, "B N"]:
        """Of every token: its clip's time, or its frame's, drawn for each frame alone (arXiv 2407.01392)."""
        if self.times_of == "clip":
            return to_tokens(self.times(rows, step), rows.segments)
        sizes = clip_sizes(rows)
        places = jnp.maximum(rows.segments - 1, 0)
        frames = positions(rows.segments) // to_tokens(jnp.asarray(sizes.frame_tokens), rows.segments)
        keys = example_keys(key(self.seed, "frame time"), step, rows.examples)

        def draw(row_keys, place, frame):
            return jax.random.uniform(jax.random.fold_in(row_keys[place], frame))

        u = jax.vmap(lambda row_keys, *at: jax.vmap(lambda *one: draw(row_keys, *one))(*at))(keys, places, frames)
        return self.objective.time(
            self._shared(u), ClipSize(*(to_tokens(jnp.asarray(part), rows.segments) for part in sizes))
        )

    def _shared(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Numbers in [0, 1), in the share of them that this model is trained at."""
        first, last = self.shares
        return first + (last - first) * u


def clip_sizes(rows: Rows) -> ClipSize:
    """Of every segment `[B G]`; of one that does not exist it is 1, 1."""
    member = rows.segments[..., None] == jnp.arange(1, rows.examples.shape[1] + 1)
    first = member & (rows.coordinates[..., :1] == 0)
    frame_tokens = jnp.maximum(first.sum(axis=1), 1)
    return ClipSize(frames=jnp.maximum(member.sum(axis=1), 1) // frame_tokens, frame_tokens=frame_tokens)


def share_below(objective: Objective, time: float) -> float:
    """The share of an objective's training times that are below a time: the inverse of `objective.time`."""
    low, high = 0.0, 1.0
    for _ in range(24):  # bits of a float32
        middle = (low + high) / 2
        below = float(objective.time(jnp.float32(middle))) < time
        low, high = (middle, high) if below else (low, middle)
    return high


def _given(dit: DitConfig | WanDitConfig, rows: Rows, known: Bool[Array, "B N"], *, count: int) -> Given:
    """What the denoiser is told of clips whose first frame is known; of others all of it is zero."""
    told = segment_max(known.astype(jnp.float32), rows.segments, count=count) > 0
    fields: dict[str, Array] = {}
    if dit.given_channels and rows.shown.shape[-1]:
        shown = to_tokens(told, rows.segments)
        fields["latents"] = given_latents(
            rows.shown, known, shown=shown, places=dit.patch.volume, channels=dit.given_channels
        )
    elif dit.given_channels:
        fields["latents"] = given_latents(rows.tokens, known, places=dit.patch.volume, channels=dit.given_channels)
    if isinstance(dit, WanDitConfig) and dit.image_width is not None:
        fields["image"] = jnp.where(to_tokens(told, rows.image_segments)[..., None], rows.image, 0)
        fields["image_segments"] = jnp.asarray(rows.image_segments)
    return Given(**fields)
