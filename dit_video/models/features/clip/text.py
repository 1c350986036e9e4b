"""The text tower of CLIP (arXiv 2103.00020)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.features.clip.layers import ClipFeatures, ClipLayer, ClipTowerConfig, LayerStates, make_projection
from dit_video.nn import LayerNorm, apply_stack, make_stack

_LEGACY_END_TOKEN = 2


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig(ClipTowerConfig):
    """Configuration of a text tower; `weights.load_clip_text` reads one from a folder."""

    vocabulary: int = 49408
    positions: int = 77
    """Maximum number of tokens of a text, including its start and end token."""
    end_token: int = 49407
    """Id of the token that is pooled. Folders from before July 2023 wrongly say 2; it then means a text's largest id,
    which is the end token's in their vocabularies."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, vocabulary=self.vocabulary, positions=self.positions)

    def make(self, rngs: nnx.Rngs) -> "ClipText":
        return ClipText(self, rngs=rngs)


class ClipText(nnx.Module):
    """A text tower of token ids to features, one text per row; each token sees itself and those before it."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocabulary, config.width)))
        self.position = nnx.Param(0.01 * jax.random.normal(rngs.params(), (config.positions, config.width)))
        self.blocks = make_stack(lambda r: ClipLayer(config, rngs=r), config.layers, rngs=rngs)
        self.norm = LayerNorm(config.width, eps=config.eps)
        self.projection = make_projection(config, rngs=rngs)

    def __call__(self, ids: Int[Array, "B S"], mask: Int[Array, "B S"]) -> ClipFeatures:
        """Return features of texts; `mask` is 0 at padding, which no token sees. Each row holds one text.

        Raises:
          UserError: rows of more than `max_positions` tokens.
        """
        length = ids.shape[1]
        if length > self.config.positions:
            raise UserError(f"a text of {length} tokens is too long: CLIP reads up to {self.config.positions}. Cut it")
        x = self.embedding[...][ids].astype(jnp.float32) + self.position[...][:length]
        visible = jnp.tril(jnp.ones((length, length), bool)) & (mask != 0)[:, None, :]
        states = apply_stack(self.blocks, LayerStates(hidden=x, penultimate=x), visible)
        values = self.norm(states.hidden)
        # Texts may be padded with more end tokens, of which the first is the end.
        is_legacy = self.config.end_token == _LEGACY_END_TOKEN
        end = jnp.argmax(ids if is_legacy else ids == self.config.end_token, axis=1)
        pooled = jnp.take_along_axis(values, end[:, None, None], axis=1)[:, 0]
        projected = None if self.projection is None else self.projection(pooled)
        return ClipFeatures(values, states.penultimate, pooled, projected)
