"""Autoencoders with quantised latents: VQ-VAE, VQGAN (arXiv 1711.00937, 2012.09841) and MoVQ (arXiv 2209.09002).

    pixels -> encoder -> linear -> nearest code -> linear -> decoder -> pixels

Encoder and decoder come from a VAE of clips or images; in MoVQ the codes also modulate the decoder's norms. Denoisers
see the latents before quantisation; decoding quantises them first, so a denoiser need not hit a code exactly.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.typing import AnyArray
from dit_video.models.autoencoders.image_vae import ImageLevels, ImageVaeConfig, ImageVaeDecoder, ImageVaeEncoder
from dit_video.models.autoencoders.interface import Latents, Normalizer, Pixels, SegmentIds
from dit_video.models.autoencoders.vae import (
    BlockInputs,
    CausalVaeConfig,
    CausalVaeDecoder,
    CausalVaeEncoder,
    NormFactory,
    make_encoder_inputs,
    make_position_norm,
)
from dit_video.nn import ConvCache, Linear
from dit_video.tokens import Grid


class SpatialNorm(nnx.Module):
    """A norm with scale and shift computed from the latents; initialised as the norm alone."""

    def __init__(self, norm: nnx.Module, width: int, channels: int, *, rngs: nnx.Rngs):
        """Create the norm: `norm` is over `width` channels, the latents have `channels`."""
        self.norm = norm
        self.scale = Linear(channels, width, init="zero", rngs=rngs)
        self.scale.bias = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = Linear(channels, width, init="zero", rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W D"], inputs: BlockInputs) -> Float[Array, "B T H W D"]:
        assert inputs.latents is not None
        x = self.norm(x, inputs)
        # The maps act on single positions, so they are computed at the latents' resolution, which is the coarsest.
        maps = (part(inputs.latents) for part in (self.scale, self.shift))
        scale, shift = (_upsample_latents(each, x.shape, inputs.is_first) for each in maps)
        return (x * scale + shift).astype(x.dtype)


def _upsample_latents(
    latents: Float[Array, "B t h w D"], shape: tuple[int, ...], is_first: bool
) -> Float[Array, "B T H W D"]:
    """Repeat each latent over all positions that it stands for."""
    frames, rows, columns = latents.shape[1:4]
    # A clip's first latent frame is a single frame at every resolution.
    repeats = (shape[1] - 1) // max(1, frames - 1) if is_first else shape[1] // frames
    if repeats > 1:
        latents = jnp.repeat(latents, repeats, axis=1)[:, repeats - 1 if is_first else 0 :]
    for axis, factor in ((2, shape[2] // rows), (3, shape[3] // columns)):
        latents = jnp.repeat(latents, factor, axis=axis) if factor > 1 else latents
    return latents


_CODES_PER_CHUNK = 1024
"""Number of codes compared with all latents at once."""
_MIN_LENGTH = 1e-12
"""Lower bound of a vector's length in divisions."""


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """Configuration of a codebook.

    Raises:
      UserError: If there are no codes, or the codes have no width.
    """

    codes: int = 8192
    """Number of codes."""
    width: int = 4
    """Values per code, which are the channels of the latents."""
    spherical: bool = False
    """True scales latents and codes to length 1, so that the nearest code has the largest cosine: with codes of 8 to 32
    values nearly all of a large codebook is used (ViT-VQGAN, arXiv 2110.04627, section 3.2)."""

    def __post_init__(self):
        check_at_least(1, codes=self.codes, width=self.width)


class QuantizedLatents(NamedTuple):
    """Latents with their nearest codes and the losses of both."""

    latents: Float[Array, "B t h w c"]
    """Latents as compared with the codes: of length 1 if the codebook is spherical."""
    vectors: Float[Array, "B t h w c"]
    """Nearest codes, with the straight-through gradient to the latents."""
    indices: Int[Array, "B t h w"]
    """Indices of the nearest codes."""
    commitment_loss: Float[Array, " B"]
    """Mean squared distance with a gradient that moves the latents to the codes."""
    codebook_loss: Float[Array, " B"]
    """Mean squared distance with a gradient that moves the codes to the latents."""


class Codebook(nnx.Module):
    """A codebook: vectors that replace latents."""

    def __init__(self, config: CodebookConfig, *, rngs: nnx.Rngs):
        self.config = config
        # Unit variance like a new encoder's latents, so that more than a few codes are the nearest to some latent.
        self.codes = nnx.Param(jax.random.normal(rngs.params(), (config.codes, config.width), jnp.float32))

    def __call__(self, latents: Float[Array, "B t h w c"]) -> QuantizedLatents:
        """Return latents, their nearest codes and the losses."""
        latents = self.normalize(latents.astype(jnp.float32))
        indices = self.find_nearest(latents)
        chosen = self._get_vectors()[indices]
        axes = (1, 2, 3, 4)
        return QuantizedLatents(
            latents=latents,
            vectors=latents + jax.lax.stop_gradient(chosen - latents),
            indices=indices,
            commitment_loss=jnp.square(latents - jax.lax.stop_gradient(chosen)).mean(axis=axes),
            codebook_loss=jnp.square(jax.lax.stop_gradient(latents) - chosen).mean(axis=axes),
        )

    def find_nearest(self, latents: Float[Array, "B t h w c"]) -> Int[Array, "B t h w"]:
        """Return the indices of the nearest codes."""
        latents, codes = self.normalize(latents), self._get_vectors()
        return find_nearest_codes(jax.lax.stop_gradient(latents), jax.lax.stop_gradient(codes))

    def look_up(self, indices: Int[AnyArray, "B t h w"]) -> Float[Array, "B t h w c"]:
        """Return the codes of indices. Inside `jax.jit` values are unknown: an index out of range gives NaN.

        Raises:
          UserError: If an index is out of range.
        """
        last = self.config.codes - 1
        if not isinstance(indices, jax.core.Tracer) and indices.size:
            low, high = int(np.min(indices)), int(np.max(indices))
            if low < 0 or high > last:
                raise UserError(
                    f"code index {low if low < 0 else high} is out of range: this codebook has 0 to {last}. "
                    "Use the codebook that the indices were made with"
                )
        # `jnp.take` would count negative indices from the end; here they are out of range.
        filled_indices = jnp.where(indices < 0, self.config.codes, indices)
        return jnp.take(self._get_vectors(), filled_indices, axis=0, mode="fill", fill_value=jnp.nan)

    def _get_vectors(self) -> Float[Array, "n c"]:
        return self.normalize(jnp.asarray(self.codes[...]))

    def normalize(self, vectors: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        """Return vectors as they are compared: of length 1 if the codebook is spherical."""
        if not self.config.spherical:
            return vectors
        # Bounded before the root: the gradient of the length itself is NaN at zero.
        squared = jnp.square(vectors).sum(axis=-1, keepdims=True)
        return vectors * jax.lax.rsqrt(jnp.maximum(squared, _MIN_LENGTH**2))


def find_nearest_codes(
    latents: Float[Array, "*batch c"], codes: Float[Array, "n c"], *, chunk: int = _CODES_PER_CHUNK
) -> Int[Array, "*batch"]:
    """Return the index of the nearest code, the first one in a tie.

    Computed as `|z - e|^2 = |z|^2 - 2 z e + |e|^2`, a matrix product; the first term is the same for all codes and left
    out. It takes memory for `chunk` distances per latent.
    """
    flat = latents.reshape(-1, latents.shape[-1])

    def update_best(best: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        start, subset = part
        # Full precision: with bfloat16, a TPU's default for products, other codes would be the nearest.
        products = jnp.matmul(flat, subset.T, precision=jax.lax.Precision.HIGHEST)
        values = 0.5 * jnp.square(subset).sum(axis=-1) - products
        least = values.min(axis=-1)
        better = least < best[0]
        index = jnp.where(better, start + values.argmin(axis=-1).astype(jnp.int32), best[1])
        return (jnp.where(better, least, best[0]), index), None

    # A scan needs chunks of one size; the codes after the last full chunk are compared separately.
    full = len(codes) // chunk * chunk
    best = jnp.full(len(flat), jnp.inf), jnp.zeros(len(flat), jnp.int32)
    if full:
        starts = jnp.arange(0, full, chunk, dtype=jnp.int32)
        best, _ = jax.lax.scan(update_best, best, (starts, codes[:full].reshape(-1, chunk, codes.shape[-1])))
    if full < len(codes):
        best, _ = update_best(best, (jnp.asarray(full, jnp.int32), codes[full:]))
    return best[1].reshape(latents.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class VqConfig:
    """Configuration of a vector-quantised autoencoder.

    Raises:
      UserError: If the network has a variance, or lacks the linear maps around the codebook.
    """

    network: CausalVaeConfig | ImageVaeConfig = field(default_factory=CausalVaeConfig)
    """Configuration of encoder and decoder; linear maps go from its `channels` to the codes' width and back."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """Configuration of the codebook."""
    modulated: bool = False
    """True lets the codes modulate the decoder's norms (MoVQ)."""

    def __post_init__(self):
        network = self.network
        if network.std is not None:
            raise UserError(f"network.std={network.std} is invalid: codes have no variance. Use None")
        if isinstance(network, ImageVaeConfig) and not (network.use_quant_conv and network.use_post_quant_conv):
            raise UserError(f"network={network} is invalid: codes need both linear maps. Use True for both")

    @classmethod
    def kandinsky(cls) -> "VqConfig":
        """Return the MoVQ of Kandinsky 2: 8×8 pixels to one of 16,384 codes of 4 values, 68 M parameters."""
        network = ImageVaeConfig(channels=4, levels=ImageLevels(widths=(128, 256, 256, 512), attention=(3,)))
        return cls(network=network, codebook=CodebookConfig(codes=16384, width=4), modulated=True)

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w)."""
        return self.network.stride

    @property
    def channels(self) -> int:
        """Return the channels of the latents, which are the codes' width."""
        return self.codebook.width

    @property
    def last_layer(self) -> str:
        return self.network.last_layer

    def make(self, rngs: nnx.Rngs) -> "VqAutoencoder":
        return VqAutoencoder(self, rngs=rngs)


class VqAutoencoder(nnx.Module):
    """An autoencoder from pixels in [-1, 1] to normalised latents, or to indices of codes, and back."""

    def __init__(self, config: VqConfig, *, rngs: nnx.Rngs):
        self.config = config
        network, width = config.network, config.codebook.width
        self.encoder: ImageVaeEncoder | CausalVaeEncoder
        self.decoder: ImageVaeDecoder | CausalVaeDecoder
        match network:
            case ImageVaeConfig(levels=levels):
                self.encoder = ImageVaeEncoder(levels, network.channels, rngs=rngs)
                self.decoder = ImageVaeDecoder(levels, network.channels, self._make_norms(levels.make_norm), rngs=rngs)
            case CausalVaeConfig():
                self.encoder = CausalVaeEncoder(network, network.channels, rngs=rngs)
                self.decoder = CausalVaeDecoder(network, self._make_norms(make_position_norm), rngs=rngs)
        self.to_codes = Linear(network.channels, width, rngs=rngs)
        self.codebook = Codebook(config.codebook, rngs=rngs)
        self.from_codes = Linear(width, network.channels, rngs=rngs)
        self.normalizer = Normalizer(width)

    def compute_latents(
        self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None
    ) -> Latents:
        """Return latents before quantisation and normalisation. See `encode` for the arguments."""
        features = self.encoder(pixels, make_encoder_inputs(pixels, self.config.stride, segment_ids, cache))
        return self.codebook.normalize(self.to_codes(features.astype(jnp.float32)))

    def quantize(self, pixels: Pixels) -> QuantizedLatents:
        """Return the quantised latents of clips, with the straight-through gradient, and their losses, for training."""
        return self.codebook(self.compute_latents(pixels))

    def reconstruct(self, codes: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels from codes, or from latents that are neither normalised nor quantised."""
        return self.decoder(self.from_codes(codes), BlockInputs(latents=codes, cache=cache)).astype(jnp.float32)

    def encode(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Latents:
        """Return normalised latents that are not quantised. See `Vae.encode` for the arguments."""
        return self.normalizer.normalize(self.compute_latents(pixels, segment_ids, cache))

    def decode(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels, approximately in [-1, 1], of the codes nearest to normalised latents of a clip or chunk."""
        return self.decode_indices(self.codebook.find_nearest(self.normalizer.denormalize(latents)), cache)

    def encode_indices(
        self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None
    ) -> Int[Array, "B t h w"]:
        """Return the index of the nearest code of each latent. See `encode` for the arguments."""
        return self.codebook.find_nearest(self.compute_latents(pixels, segment_ids, cache))

    def decode_indices(self, indices: Int[AnyArray, "B t h w"], cache: ConvCache | None = None) -> Pixels:
        """Return pixels, approximately in [-1, 1], of codes. Inside `jax.jit` an index out of range gives NaN.

        Raises:
          UserError: If an index is out of range.
        """
        return self.reconstruct(self.codebook.look_up(indices), cache)

    def _make_norms(self, norm: NormFactory) -> NormFactory:
        """Return the decoder's norms: `norm`, modulated by the codes if the config says so."""
        if not self.config.modulated:
            return norm
        return lambda width, rngs: SpatialNorm(norm(width, rngs), width, self.config.channels, rngs=rngs)
