"""Loss of a text-conditioned denoiser on packed rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from dit_video.core.rng import example_keys, key
from dit_video.core.typing import AnyArray
from dit_video.diffusion import ClipSize, DenoiseFn, Objective, draw_low_discrepancy
from dit_video.models.backbones.block_features import BlockFeatures
from dit_video.models.backbones.denoise import adapt_prediction, make_denoise_fn, make_text_record
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import (
    COND_LATENTS,
    COND_MASK,
    IMAGE_TOKENS,
    ClipConditioning,
    Conditioning,
    ConditioningLatents,
    FrameConditioning,
    ImageTokens,
    TrainingKeys,
    drop_captions,
    interleave_mask,
    make_cond_latents,
    make_image_tokens,
)
from dit_video.nn import add_lora_scale, attach_lora
from dit_video.tokens import PackedBatch, expand_to_tokens, segment_mean
from dit_video.training.losses.auxiliary import AUXILIARY, AuxiliaryInputs, AuxiliaryTerm, split_heads
from dit_video.training.optim.optimizer import OptimizerConfig, freeze
from dit_video.training.step import Average, Loss, LossDetails, LossOutput

TEMPORAL_PATHS = rf"(^|/)temporal|^{AUXILIARY}/"
"""Regular expression for the paths of the temporal layers, which mix frames only, and of auxiliary losses' heads."""


@dataclass(frozen=True, kw_only=True)
class DenoiserLoss:
    """Mean over the clips of a batch of each clip's mean squared error, plus weighted means of auxiliary losses.

    The metrics are `padding`, the share of padding tokens; `masked`, the share of clips that could not be read and do
    not count; the loss by diffusion times, `loss_t0-0.25` and so on; and with auxiliary losses `loss_denoising` and
    each `loss_NAME`. Parameters are `{"backbone": ..., "text": ...}`: the text encoder is trained together with the
    denoiser, and so are the heads of auxiliary losses, `"auxiliary"`, if there are any. `text` has no parameters if the
    encoder is frozen, in which case rows hold its embeddings, or if captions are classes (`ClassNames`).
    """

    backbone: nnx.GraphDef
    text_encoder: nnx.GraphDef
    objective: Objective
    caption_dropout: float
    empty_caption: Shaped[np.ndarray, "s *E"]
    """Tokens of an empty caption, or their embeddings."""
    seed: int
    frame_conditioning: FrameConditioning | None = None
    """Frame conditioning of an image-to-video model; None without it. Known frames are passed as latents in further
    channels or, if each token has its own time, as noise-free tokens at time 0, which do not count in the loss. Image
    embeddings of the first frame are zeroed for clips whose first frame is not known."""
    time_quantiles: tuple[float, float] = (0.0, 1.0)
    """Lower and upper quantile of the objective's times that this model is trained at, such as the times of one of two
    experts; see `time_quantile`."""
    time_per: Literal["clip", "frame"] = "clip"
    """Unit that has its own diffusion time; "frame" requires a denoiser with `time="token"`."""
    optimizer: OptimizerConfig | None = None
    """Optimizer whose untrained parameters get no gradients; None if all parameters are trained."""
    auxiliary: tuple[AuxiliaryTerm, ...] = ()
    """Losses besides the model's own."""
    is_training: bool = True
    """False in validation and checks, where the model itself draws no random numbers, and auxiliary losses are metrics
    alone."""
    time_bins: int = 4
    """Number of equally wide bins of diffusion times whose losses are logged separately."""

    def __call__(self, params, rows: PackedBatch, step: Array) -> LossOutput:
        layout, noise = rows.layout, self.draw_noise(rows, step)
        drop = self.draw_dropped_captions(rows, step)
        text, text_segments = drop_captions(rows.text, rows.text_segments, drop, empty=self.empty_caption)

        params = params if self.optimizer is None else freeze(self.optimizer, params)
        rows = rows._replace(text=text, text_segments=text_segments)
        denoise, clean = self.make_denoise(params, rows, step)
        data, time = jnp.asarray(rows.tokens), self.draw_token_times(rows, step)
        if clean is not None and COND_MASK in rows.fields:
            # Parts of a clip are known from the clip in which all else is grey, as in sampling.
            data = jnp.where(clean[..., None], rows.fields[COND_LATENTS], data)
        calls: list[_Call] = []

        def record(noisy, model_time, state):
            prediction, state = denoise(noisy, model_time, state)
            calls.append(_Call(noisy, model_time, prediction, state))
            return prediction, state

        per_token = self.objective.loss(record, data, noise, time, cond_mask=clean)
        counted = rows.segments if clean is None else jnp.where(clean, 0, rows.segments)
        per_example = segment_mean(per_token, counted, count=layout.count)
        num_clips = rows.segments.max(axis=1).sum()
        metrics = {
            "padding": (rows.segments == 0).mean(axis=(0, 1)),
            "masked": Average(num_clips - rows.valid.sum(), num_clips),
            **self.loss_by_time(per_token, time, counted, rows.valid),
        }
        count = jnp.asarray(rows.valid).sum()
        value = (per_example * rows.valid).sum() / jnp.maximum(count, 1)
        if self.auxiliary:
            inputs = self._make_auxiliary_inputs(calls[0], rows, step)
            totals = {term.loss.name: term.sum_clips(params, inputs) for term in self.auxiliary}
            metrics |= {f"loss_{name}": Average(total, count) for name, total in totals.items()}
            if self.is_training:
                metrics["loss_denoising"] = Average(value * count, count)
                weights = {term.loss.name: term.weight(step) for term in self.auxiliary}
                value += sum(weights[name] * total for name, total in totals.items()) / jnp.maximum(count, 1)
        return LossOutput(value, LossDetails(metrics, count.astype(jnp.float32)))

    def _make_auxiliary_inputs(self, call: "_Call", rows: PackedBatch, step: Array) -> AuxiliaryInputs:
        process, token_time = self.objective.process, call.time[..., None]
        prediction = adapt_prediction(self.objective.prediction, rows.layout)
        noisy = call.noisy / process.input_scale(token_time)
        estimate = prediction.estimate(process, noisy, call.prediction.astype(noisy.dtype), token_time)
        return AuxiliaryInputs(jax.tree.map(jnp.asarray, rows), call.time, estimate, call.features or {}, step)

    def make_denoise(self, params, rows: PackedBatch, step: Array) -> tuple[DenoiseFn, Bool[Array, "B N"] | None]:
        """Return the function that denoises these rows, and the tokens it gets without noise if each has a time.

        Where auxiliary losses read features, they are the function's next state.
        """
        backbone, cond_mask = nnx.merge(self.backbone, params["backbone"]), self.draw_cond_mask(rows, step)
        context = nnx.merge(self.text_encoder, params["text"])(rows.text, rows.text_segments)
        conditioning = _make_frame_conditioning(backbone.config, rows, cond_mask).add(
            make_text_record(context, rows.layout),
            *(self.prepare_conditioning(each, rows, step) for each in backbone.config.conditioning),
        )
        if self.is_training and backbone.config.draws_in_training:
            conditioning = conditioning.add(self.make_training_keys(rows, step))
        clean = cond_mask if backbone.config.time == "token" else None
        is_clean = clean if self.time_per == "clip" else None
        if blocks := tuple(block for term in self.auxiliary for block in term.loss.blocks):
            backbone = BlockFeatures(backbone, blocks)
        return make_denoise_fn(backbone, rows.layout, conditioning, is_clean=is_clean), clean

    def make_training_keys(self, rows: PackedBatch, step: Array) -> TrainingKeys:
        """Return the keys from which the model itself draws."""
        own = key(self.seed, "model")
        return TrainingKeys(step=jax.random.fold_in(own, step), rows=example_keys(own, step, rows.examples[:, 0]))

    def draw_noise(self, rows: PackedBatch, step: Array) -> Float[Array, "B N p"]:
        """Return standard normal noise, drawn per example and independently of its row."""
        keys = example_keys(key(self.seed, "noise"), step, rows.examples)
        return rows.layout.sample_noise(keys, rows.tokens.shape[-1])

    def draw_dropped_captions(self, rows: PackedBatch, step: Array) -> Bool[Array, "B G"]:
        """Return True for clips whose caption is replaced by the empty one."""
        keys = example_keys(key(self.seed, "caption dropout"), step, rows.examples)
        return jax.vmap(jax.vmap(jax.random.uniform))(keys) < self.caption_dropout

    def loss_by_time(
        self,
        per_token: Float[Array, "B N"],
        time: Float[Array, "B N"],
        counted: Int[AnyArray, "B N"],
        valid: Bool[AnyArray, "B G"],
    ) -> dict[str, Average]:
        """Return the mean loss in each bin of diffusion times; a clip with times in several bins counts in parts."""
        is_member = counted[..., None] == jnp.arange(1, valid.shape[1] + 1)
        # Each token weighs 1 / tokens of its clip, so that every valid clip has a total weight of 1.
        weight = jnp.where(is_member, (valid / jnp.maximum(is_member.sum(axis=1), 1))[:, None], 0).sum(axis=-1)
        time_bin = jnp.clip(jnp.floor(time * self.time_bins), 0, self.time_bins - 1)
        metrics = {}
        for index in range(self.time_bins):
            bin_weight = jnp.where(time_bin == index, weight, 0)
            name = f"loss_t{index / self.time_bins:g}-{(index + 1) / self.time_bins:g}"
            metrics[name] = Average((bin_weight * jax.lax.stop_gradient(per_token)).sum(), bin_weight.sum())
        return metrics

    def draw_cond_mask(self, rows: PackedBatch, step: Array) -> Bool[Array, "B N"]:
        """Return True for tokens that are known, drawn per example and independently of the mesh."""
        if self.frame_conditioning is None:
            return jnp.zeros(rows.segments.shape, bool)
        if COND_MASK in rows.fields:
            return jnp.asarray(rows.fields[COND_MASK]).min(axis=-1) == 1
        keys = example_keys(key(self.seed, "known frames"), step, rows.examples)
        return self.frame_conditioning.draw_mask(rows.layout, keys)

    def prepare_conditioning(self, config: ClipConditioning, rows: PackedBatch, step: Array) -> Any:
        """Return the record of a field of the clips, with some clips' values dropped."""
        keys = example_keys(key(self.seed, f"{config.field.name} dropout"), step, rows.examples)
        return config.prepare(jnp.asarray(rows.fields[config.field.name]), rows.layout, keys, None)

    def draw_times(self, rows: PackedBatch, step: Array) -> Float[Array, "B G"]:
        """Return diffusion times of clips, low-discrepancy over consecutive ranks of the data plan."""
        offset = jax.random.uniform(jax.random.fold_in(key(self.seed, "time"), step))
        u = self._to_time_quantiles(draw_low_discrepancy(offset, rows.examples))
        return self.objective.compute_time(u, get_clip_sizes(rows))

    def draw_token_times(self, rows: PackedBatch, step: Array) -> Float[Array, "B N"]:
        """Return the diffusion time of each token: its clip's, or its frame's (arXiv 2407.01392)."""
        if self.time_per == "clip":
            return expand_to_tokens(self.draw_times(rows, step), rows.segments)
        sizes = ClipSize(*(expand_to_tokens(jnp.asarray(part), rows.segments) for part in get_clip_sizes(rows)))
        segment_indices = jnp.maximum(rows.segments - 1, 0)
        frames = rows.layout.compute_offsets() // sizes.frame_tokens
        keys = example_keys(key(self.seed, "frame time"), step, rows.examples)

        def draw(row_keys, segment_index, frame):
            return jax.random.uniform(jax.random.fold_in(row_keys[segment_index], frame))

        u = jax.vmap(jax.vmap(draw, in_axes=(None, 0, 0)))(keys, segment_indices, frames)
        return self.objective.compute_time(self._to_time_quantiles(u), sizes)

    def _to_time_quantiles(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Map uniform numbers in [0, 1) to the quantiles of times that this model is trained at."""
        first, last = self.time_quantiles
        return first + (last - first) * u


class _Call(NamedTuple):
    """A call of the denoiser."""

    noisy: Float[Array, "B N p"]
    """Noisy tokens in the scale of the model's inputs."""
    time: Float[Array, "B N"]
    prediction: Float[Array, "B N prediction"]
    features: dict[int, Float[Array, "B N D"]] | None
    """Tokens behind blocks; None where no auxiliary loss reads any."""


def get_clip_sizes(rows: PackedBatch) -> ClipSize:
    """Return the size of each segment `[B G]`; 1 frame of 1 token for segments that do not exist."""
    is_member = rows.segments[..., None] == jnp.arange(1, rows.examples.shape[1] + 1)
    is_first_frame = is_member & (rows.positions[..., :1] == 0)
    frame_tokens = jnp.maximum(is_first_frame.sum(axis=1), 1)
    return ClipSize(frames=jnp.maximum(is_member.sum(axis=1), 1) // frame_tokens, frame_tokens=frame_tokens)


def time_quantile(objective: Objective, time: float) -> float:
    """Return the share of an objective's training times below `time`: the inverse of `objective.compute_time`."""
    low, high = 0.0, 1.0
    for _ in range(24):  # bisection to the precision of float32
        middle = (low + high) / 2
        below = float(objective.compute_time(jnp.float32(middle))) < time
        low, high = (middle, high) if below else (low, middle)
    return high


def _make_frame_conditioning(config: BackboneConfig, rows: PackedBatch, cond_mask: Bool[Array, "B N"]) -> Conditioning:
    """Return the conditioning on known frames, which is zero for clips whose first frame is not known."""
    layout = rows.layout
    is_conditioned = layout.max(cond_mask.astype(jnp.float32)) > 0
    conditioning, kinds = Conditioning(), config.conditioning_kinds
    if ConditioningLatents in kinds:
        if COND_MASK in rows.fields:
            mask, latents = rows.fields[COND_MASK], rows.fields[COND_LATENTS]
            values = interleave_mask(mask, latents, patch_volume=config.patch.volume)
        else:
            latents, visible = rows.tokens, cond_mask
            if COND_LATENTS in rows.fields:
                latents, visible = rows.fields[COND_LATENTS], layout.expand(is_conditioned)
            sizes = {"patch_volume": config.patch.volume, "channels": config.cond_channels}
            values = make_cond_latents(latents, cond_mask, visible=visible, **sizes)
        conditioning = conditioning.add(ConditioningLatents(values))
    if ImageTokens in kinds:
        images = make_image_tokens(rows.fields[IMAGE_TOKENS], layout)
        is_visible = expand_to_tokens(is_conditioned, images.segments)[..., None]
        conditioning = conditioning.add(images._replace(values=jnp.where(is_visible, images.values, 0)))
    return conditioning


def attach_factors(params: Mapping[str, Any], factors: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Return parameters with the trained factors of an adapter attached, and the heads trained with them.

    `scale` is alpha / rank.
    """
    factors, heads = split_heads(factors)
    return attach_lora(params, add_lora_scale(factors, scale)) | heads


@dataclass(frozen=True, kw_only=True)
class LoraLoss:
    """A loss of a model with a LoRA adapter, `loss(factors, batch, step, ..., model's parameters)`.

    It is differentiated in the factors only: neither gradients nor optimizer moments of the model's kernels exist.
    """

    loss: Loss
    """Loss as a function of the model's parameters."""
    scale: float
    """Scale of the adapter, alpha / rank."""

    def __call__(self, factors: PyTree, batch: PyTree, step: Array, *constants: PyTree) -> LossOutput:
        *others, params = constants
        return LossOutput.from_pair(*self.loss(attach_factors(params, factors, self.scale), batch, step, *others))
