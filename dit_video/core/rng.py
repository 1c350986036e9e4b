"""Random numbers as a function of their purpose.

Every random number is drawn from `fold_in(seed, purpose, step, example id)`, so it does not depend on the number of
devices, hosts or rows. A run resumes exactly, and continues on another mesh with the same draws.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from dit_video.core.errors import check_at_least
from dit_video.core.typing import AnyArray


def key(seed: int, purpose: str) -> Key[Array, ""]:
    """Return the key of a purpose. Different purposes of one seed are independent."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def example_keys(
    purpose_key: Key[Array, ""], step: Array | int, examples: UInt32[AnyArray, "..."]
) -> Key[Array, "..."]:
    """Return one key for every example at one step, whatever row or device the example lies on."""
    step_key = jax.random.fold_in(purpose_key, jnp.asarray(step, jnp.uint32))
    flat = jax.vmap(lambda example: jax.random.fold_in(step_key, example))(examples.reshape(-1))
    return flat.reshape(examples.shape)


def make_generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """Return a NumPy generator that is a function of (seed, purpose, ids) alone.

    Raises:
      UserError: If the seed is negative.
    """
    check_at_least(0, seed=seed)
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *ids])
