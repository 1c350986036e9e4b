"""Conditioning of sampled clips besides their prompts: fields of a request, and what the rows make of them.

A model reads conditioning latents and image tokens as inputs. Clean latents need a model with a time per token: it sees
the tokens of the first latent frames clean, at time 0, and they are not changed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dit_video.conditioning import (
    COND_LATENTS,
    IMAGE_TOKENS,
    ClipConditioning,
    Conditioning,
    ConditioningLatents,
    make_image_tokens,
)
from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.diffusion import DenoiseFn, Process
from dit_video.tokens import Field, Grid, PackedBatch, patchify

CLEAN_LATENTS = "clean_latents"
"""Name of a request's field: the first latent frames `f h w c`, which are kept."""
_CLEAN_TOKENS, _CLEAN_MASK = "clean_tokens", "clean_mask"
"""Names of the fields of rows that hold the clean latents of all clips: the tokens, and which of them are clean."""


def make_row_fields(
    fields: Mapping[str, np.ndarray], latents: tuple[int, ...], patch: Grid, *, has_clean: bool
) -> dict[str, np.ndarray]:
    """Return a request's fields as its row holds them.

    Args:
      fields: fields of the request: `cond_latents` `t h w g`, `image_tokens` `i F`, `clean_latents` `f h w c`.
      latents: shape of the clip's latents, `t h w c`.
      patch: patch size of the denoiser.
      has_clean: True if clips in the same rows have clean latents.
    """
    row_fields = {}
    if COND_LATENTS in fields:
        row_fields[COND_LATENTS] = patchify(fields[COND_LATENTS], patch)
    if IMAGE_TOKENS in fields:
        row_fields[IMAGE_TOKENS] = fields[IMAGE_TOKENS]
    if has_clean:
        values, mask = np.zeros(latents, np.float32), np.zeros((*latents[:3], 1), np.float32)
        if (clean := fields.get(CLEAN_LATENTS)) is not None:
            values[: len(clean)], mask[: len(clean)] = clean, 1
        row_fields[_CLEAN_TOKENS] = patchify(values, patch)
        row_fields[_CLEAN_MASK] = patchify(mask, patch)[:, 0]
    return row_fields


def describe_row_fields(row_fields: Mapping[str, np.ndarray]) -> list[Field]:
    """Return the fields of `make_row_fields` in rows of which one clip has these."""
    return [
        Field(name=name, alignment="sequence", shape=values.shape[1:], length=len(values))
        if name == IMAGE_TOKENS
        else Field(name=name, alignment="grid", shape=values.shape[1:])
        for name, values in row_fields.items()
        if name in (COND_LATENTS, IMAGE_TOKENS, _CLEAN_TOKENS, _CLEAN_MASK)
    ]


def make_request_fields(
    configs: Sequence[ClipConditioning], values: Mapping[str, Any], latents: Grid
) -> dict[str, np.ndarray]:
    """Return a request's values of conditioning by fields, for latents of this size; zero for those that it lacks.

    Raises:
      UserError: the model has no conditioning of a name, or does not accept a value.
    """
    names = [each.field.name for each in configs]
    if unknown := sorted(set(values) - set(names)):
        fix = f"use {', '.join(names)}" if names else "leave it out"
        raise UserError(f"conditioning {', '.join(unknown)} is unknown to this model; {fix}")
    fields = {}
    for each in configs:
        name, shape = each.field.name, each.field.get_shape(latents)
        field = each.from_request(values[name], latents) if name in values else np.zeros(shape, each.field.dtype)
        if field.shape != shape:
            raise UserError(
                f"conditioning {name} has the shape {list(field.shape)}, not {list(shape)}; mend from_request"
            )
        fields[name] = field
    return fields


def make_conditioning(batch: PackedBatch, configs: Sequence[ClipConditioning]) -> Conditioning:
    """Return the records of the fields that a model reads, of which `configs` describe some."""
    layout = batch.layout
    conditioning = Conditioning(*(each.prepare(batch.fields[each.field.name], layout, None) for each in configs))
    if COND_LATENTS in batch.fields:
        conditioning = conditioning.add(ConditioningLatents(jnp.asarray(batch.fields[COND_LATENTS])))
    if IMAGE_TOKENS in batch.fields:
        conditioning = conditioning.add(make_image_tokens(batch.fields[IMAGE_TOKENS], batch.layout))
    return conditioning


def hold_clean_tokens(denoise: DenoiseFn, batch: PackedBatch, process: Process) -> DenoiseFn:
    """Return a `denoise` of times of tokens as one of a single time, with clean tokens as they are, at time 0."""

    def denoise_rest(noisy, time, state):
        times = jnp.full(noisy.shape[:2], time)
        if _CLEAN_TOKENS not in batch.fields:
            return denoise(noisy, times, state)
        clean = process.input_scale(jnp.zeros(())) * jnp.asarray(batch.fields[_CLEAN_TOKENS])
        is_clean = jnp.asarray(batch.fields[_CLEAN_MASK]) > 0
        return denoise(jnp.where(is_clean[..., None], clean, noisy), jnp.where(is_clean, 0.0, times), state)

    return denoise_rest


def restore_clean_tokens(tokens: Float[AnyArray, "*steps B N p"], fields: Mapping[str, Any]) -> Any:
    """Return sampled tokens with the clean ones restored."""
    if _CLEAN_TOKENS not in fields:
        return tokens
    return jnp.where(jnp.asarray(fields[_CLEAN_MASK])[..., None] > 0, fields[_CLEAN_TOKENS], tokens)
