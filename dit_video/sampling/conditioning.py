"""Conditioning of sampled clips besides their prompts: fields of requests, and the records that a model gets."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dit_video.core.errors import UserError
from dit_video.models.conditioning import (
    COND_LATENTS,
    IMAGE_TOKENS,
    ClipConditioning,
    Conditioning,
    ConditioningLatents,
    make_image_tokens,
)
from dit_video.tokens import Field, Grid, PackedBatch


def make_request_fields(
    configs: Sequence[ClipConditioning],
    values: Mapping[str, Any],
    strengths: Mapping[str, float | int | Sequence[float | int]],
    latents: Grid,
) -> dict[Field, np.ndarray]:
    """Return a request's values of conditioning by fields and their strengths, for latents of this size.

    Values that the request lacks are zero.

    Raises:
      UserError: the model has no conditioning of a name, or does not accept a value.
    """
    names = [each.field.name for each in configs]
    if unknown := sorted({*values, *strengths} - set(names)):
        fix = f"use {', '.join(names)}" if names else "leave it out"
        raise UserError(f"conditioning {', '.join(unknown)} is unknown to this model; {fix}")
    fields: dict[Field, np.ndarray] = {}
    for each in configs:
        name, shape = each.field.name, each.field.get_shape(latents)
        strength = np.asarray(strengths.get(name, 1), np.float32)
        if name in strengths and (rule := _check_strength(each, strength)):
            raise UserError(f"strengths={dict(strengths)} is invalid: {name} {rule}.")
        field = each.from_request(values[name], latents) if name in values else np.zeros(shape, each.field.dtype)
        if field.shape != shape:
            raise UserError(
                f"conditioning {name} has the shape {list(field.shape)}, not {list(shape)}; mend from_request"
            )
        fields |= zip(list_fields(each), (field, np.broadcast_to(strength, each.strength_shape)), strict=True)
    return fields


def _check_strength(config: ClipConditioning, strength: np.ndarray) -> str | None:
    """Return the rule that a strength breaks; None for one that is valid."""
    if config.field.dtype != "float32":
        return "holds integers, which have no strength. Leave it out"
    if strength.shape in ((), config.strength_shape):
        return None
    counts = f" or {', '.join(map(str, config.strength_shape))}" if config.strength_shape else ""
    return f"has one strength{counts}, not {strength.size}. Use one number{counts and ' or as many'}"


def make_conditioning(batch: PackedBatch, configs: Sequence[ClipConditioning], keys: Key[Array, "B G"]) -> Conditioning:
    """Return the records of the fields that a model reads, of which `configs` describe some.

    Args:
      batch: rows with the fields of requests.
      configs: conditioning of the model by fields.
      keys: keys of the requests' seeds.
    """
    fields, layout = batch.fields, batch.layout
    conditioning = Conditioning()
    for each in configs:
        name = each.field.name
        own_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, zlib.crc32(name.encode()))
        values, strength = (jnp.asarray(fields[field.name]) for field in list_fields(each))
        conditioning = conditioning.add(each.prepare(values, layout, own_keys, strength))
    if COND_LATENTS in fields:
        conditioning = conditioning.add(ConditioningLatents(jnp.asarray(fields[COND_LATENTS])))
    if IMAGE_TOKENS in fields:
        conditioning = conditioning.add(make_image_tokens(fields[IMAGE_TOKENS], layout))
    return conditioning


def list_fields(config: ClipConditioning) -> tuple[Field, Field]:
    """Return the fields of requests for a conditioning: its values, and their strength."""
    return config.field, Field(name=f"{config.field.name}_strength", alignment="example", shape=config.strength_shape)
