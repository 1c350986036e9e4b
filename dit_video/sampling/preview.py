"""Preview decoder: a map of every latent, by itself, to its pixels, many times faster than an autoencoder's decoder.

It is least squares in closed form, so that it can be fitted while a model is used: from latents of sampled clips and
what the autoencoder makes of them.
"""

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8

from dit_video.core import pixels
from dit_video.core.errors import UserError
from dit_video.data.latents.codec import LatentCodec
from dit_video.models.autoencoders import latent_grid
from dit_video.tokens import Grid
from dit_video.video import Clip
from dit_video.weights import load, load_metadata, save

MAX_QUADRATIC_CHANNELS = 16
"""Latents of more channels have linear features only: products of 48 channels are 1225 features."""
RANK_PER_CHANNEL = 2
"""Number of linear combinations of features that pixels are made of, per channel; those of the shipped model lose
0.3 dB by it."""
MAX_LATENT = 6.0
"""Latents, which have about unit variance, are clipped to this magnitude: early estimates may be of any size."""
_LINEAR_RIDGE, _QUADRATIC_RIDGE = 3.0, 300.0
"""Weights of squared coefficients, in units of one latent's error: a single small clip has too few latents for products
of channels, and hundreds of clips outweigh any ridge."""
_MAX_FITTED = 16384
"""Maximum number of a clip's latents that are added to the sums: its latents are alike, and 480p has 130,000."""
_CHUNK = 16384
"""Number of latents that are decoded at once: their features and pixels should not fill the memory."""


@dataclass(frozen=True, eq=False)
class PreviewDecoder:
    """A low-rank map of the features of a latent to its pixels: `features(latent) @ projection @ patches`.

    The features are 1, the channels and, for few channels, their products.
    """

    stride: Grid
    """Stride of the autoencoder."""
    channels: int
    """Channels of its latents."""
    projection: Float32[np.ndarray, "f r"]
    """Weights of the features in the rows of `patches`."""
    patches: Float32[np.ndarray, "r p"]
    """Pixels in [-1, 1], in the order of `to_patches`."""
    _weights: dict[int, tuple[Float32[np.ndarray, "f s"], Float32[np.ndarray, "s q"]]] = field(
        default_factory=dict, init=False, repr=False
    )
    """Weights of pixels in 0.5..255.5, by the factor that pictures are reduced by."""

    def __post_init__(self):
        linear = 1 + self.channels
        (features, rank), values = self.projection.shape, self.stride.volume * 3
        if features not in (linear, linear * (linear + 1) // 2) or self.patches.shape != (rank, values):
            shapes = f"{list(self.projection.shape)} and {list(self.patches.shape)}"
            raise UserError(
                f"weights of shape {shapes} are invalid: they do not fit {self.channels} channels and stride "
                f"{'x'.join(map(str, self.stride))}. Fit the preview decoder again"
            )

    def decode(self, latents: Float[np.ndarray, "t h w c"], *, fps: float | int, max_side: int | None = None) -> Clip:
        """Return a rough picture of what normalised latents decode to.

        Args:
          latents: Any values: an early estimate of a clip, even with NaN or infinity.
          fps: Frame rate of the clip.
          max_side: Maximum height and width in pixels; larger pictures are reduced by a whole number, which makes them
            faster, too.

        Raises:
          UserError: If the latents have another number of channels, or the maximum is below 1.
        """
        if np.ndim(latents) != 4 or np.shape(latents)[-1] != self.channels:
            raise UserError(
                f"latents of shape {list(np.shape(latents))} are invalid: this preview decoder takes "
                f"[t h w {self.channels}]. Use latents of the autoencoder that it was fitted to"
            )
        if max_side is not None and max_side < 1:
            raise UserError(f"max_side={max_side} is invalid: must be at least 1. Use None for the full size")
        factor, step = (1, 1) if max_side is None else self._choose_reduction(np.shape(latents), max_side)
        projection, patches = self._reduce_weights(factor)
        values = np.asarray(latents, np.float32)[:, ::step, ::step]
        t, h, w = values.shape[:3]
        a, b, c = self.stride.t, self.stride.h // factor, self.stride.w // factor
        frames = np.empty((t, a, h, b, w, c * 3), np.uint8)
        count = max(1, _CHUNK // (h * w))
        for start in range(0, t, count):
            features = compute_features(values[start : start + count], is_quadratic=self.is_quadratic)
            # One product for each latent frame: those of small clips then don't wait for threads.
            decoded = features.reshape(-1, h * w, len(projection)) @ projection @ patches
            np.clip(decoded, 0, 255, out=decoded)
            # The cast rounds down.
            frames[start : start + count] = decoded.reshape(-1, h, w, a, b, c * 3).transpose(0, 3, 1, 4, 2, 5)
        return Clip(frames=frames.reshape(t * a, h * b, w * c, 3)[a - 1 :], fps=fps)

    @property
    def is_quadratic(self) -> bool:
        """Return whether products of channels are features."""
        return len(self.projection) > 1 + self.channels

    def save(self, path: str | os.PathLike) -> None:
        """Write the decoder to a safetensors file, in float16."""
        metadata = {"stride": ",".join(map(str, self.stride)), "channels": str(self.channels)}
        save(path, {"projection": self.projection, "patches": self.patches}, metadata=metadata, dtype=np.float16)

    def _choose_reduction(self, shape: tuple[int, ...], max_side: int) -> tuple[int, int]:
        """Return the factor that every patch is reduced by, and the step between latents that are decoded."""
        stride = self.stride
        side = max(shape[1] * stride.h, shape[2] * stride.w)
        factors = [each for each in range(1, stride.h + 1) if stride.h % each == stride.w % each == 0]
        for factor in factors:
            if side <= factor * max_side:
                return factor, 1
        return factors[-1], -(-side // (factors[-1] * max_side))

    def _reduce_weights(self, factor: int) -> tuple[Float32[np.ndarray, "f s"], Float32[np.ndarray, "s q"]]:
        if factor not in self._weights:
            a, b, c = self.stride
            blocks = self.patches.reshape(-1, a, b // factor, factor, c // factor, factor, 3)
            reduced = blocks.mean(axis=(3, 5)).reshape(len(self.patches), -1) * 127.5
            # One more column for the constant, which half a level is added to for rounding.
            first = np.eye(len(self.projection), 1, dtype=np.float32)
            constant = np.full((1, reduced.shape[1]), 128.0, np.float32)
            self._weights[factor] = np.hstack([self.projection, first]), np.vstack([reduced, constant])
        return self._weights[factor]


class PreviewFit:
    """Running sums of the least squares that a preview decoder is the solution of; clips are added one by one.

    Args:
      stride: Stride of the autoencoder.
      channels: Channels of its latents.
    """

    def __init__(self, stride: Grid, channels: int):
        self.stride, self.channels = stride, channels
        self.clips = 0
        """Number of clips that were added."""
        linear = 1 + channels
        self._is_quadratic = channels <= MAX_QUADRATIC_CHANNELS
        features = linear * (linear + 1) // 2 if self._is_quadratic else linear
        self._products = np.zeros((features, features))
        self._targets = np.zeros((features, stride.volume * 3))

    def add(self, latents: Float[np.ndarray, "t h w c"], frames: UInt8[np.ndarray, "T H W 3"]) -> None:
        """Add a clip: normalised latents, and the frames that the autoencoder decodes them to.

        Raises:
          UserError: If the latents are not finite or have another number of channels, or the frames have another size.
        """
        expected = (*latent_grid(Grid(*frames.shape[:3]), self.stride), self.channels)
        if np.shape(latents) != expected:
            raise UserError(
                f"latents of shape {list(np.shape(latents))} are invalid: frames of {list(frames.shape)} have latents "
                f"{list(expected)}. Use the latents and frames of one clip"
            )
        values = np.asarray(latents, np.float64)
        if not np.isfinite(values).all():
            raise UserError("the latents hold NaN or infinity; use those of a finished clip")
        generator, count = np.random.default_rng(0), -(-_MAX_FITTED // len(values))
        t, h, w = values.shape[:3]
        a, b, c = self.stride
        for index in range(t):
            rows, columns = np.divmod(generator.permutation(h * w)[:count], w)
            part = frames[max(0, 1 + (index - 1) * a) : 1 + index * a]
            if index == 0:
                # As in `to_patches`: the first patch is one frame, repeated.
                part = np.repeat(part, a, axis=0)
            patches = part.reshape(a, h, b, w, c, 3)[:, rows, :, columns]
            targets = pixels.to_float(patches).astype(np.float64).reshape(len(rows), -1)
            features = compute_features(values[index, rows, columns], is_quadratic=self._is_quadratic)
            self._products += features.T @ features
            self._targets += features.T @ targets
        self.clips += 1

    def solve(self) -> PreviewDecoder:
        """Return the decoder with the least squared error of the clips so far, of low rank.

        Raises:
          UserError: If no clip was added.
        """
        if not self.clips:
            raise UserError("a preview decoder is fitted to clips: add at least one")
        ridge = np.full(len(self._products), _QUADRATIC_RIDGE)
        ridge[: 1 + self.channels] = _LINEAR_RIDGE
        ridge[0] = 0
        moments = self._products + np.diag(ridge)
        # Reduced-rank regression: the first principal components of what the full map predicts. With moments = L L^T,
        # they are those of L^-1 targets, whose squares are as few as the features.
        root = np.linalg.cholesky(moments)
        whitened = np.linalg.solve(root, self._targets)
        rank = min(RANK_PER_CHANNEL * self.channels, *whitened.shape)
        vectors = np.linalg.eigh(whitened @ whitened.T)[1][:, ::-1][:, :rank]
        projection, patches = np.linalg.solve(root.T, vectors), vectors.T @ whitened
        return PreviewDecoder(self.stride, self.channels, projection.astype(np.float32), patches.astype(np.float32))


def fit_preview_decoder(codec: LatentCodec, clips: Iterable[Clip]) -> PreviewDecoder:
    """Return the preview decoder of an autoencoder, fitted to what it makes of clips whose sizes fit its stride.

    Raises:
      UserError: If there are no clips, or a size does not fit.
    """
    fit = PreviewFit(codec.config.stride, codec.config.channels)
    for clip in clips:
        latents = codec.encode(clip)
        fit.add(latents, codec.decode(latents, fps=clip.fps).frames)
    return fit.solve()


def compute_features(
    latents: Float32[np.ndarray, "*grid c"] | Float64[np.ndarray, "*grid c"], *, is_quadratic: bool
) -> Float32[np.ndarray, "n f"] | Float64[np.ndarray, "n f"]:
    """Return 1, the clipped channels and, if asked for, their products, for every latent."""
    channels = latents.shape[-1]
    features = np.empty((latents.size // channels, 1 + channels), latents.dtype)
    features[:, 0] = 1
    features[:, 1:] = latents.reshape(-1, channels)
    if not np.isfinite(features).all():
        features = np.nan_to_num(features, nan=0.0)
    np.clip(features, -MAX_LATENT, MAX_LATENT, out=features)
    if not is_quadratic:
        return features
    first, second = _list_pairs(1 + channels)
    return features[:, first] * features[:, second]


@functools.lru_cache
def _list_pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(count)


def load_preview_decoder(path: str | os.PathLike) -> PreviewDecoder:
    """Read a preview decoder.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file holds something else.
    """
    metadata, arrays = load_metadata(path), load(path)
    if not {"stride", "channels"} <= metadata.keys() or arrays.keys() != {"projection", "patches"}:
        raise UserError(f"{path} holds no preview decoder. Fit it again with tools/fit_preview_decoder.py")
    stride = Grid(*map(int, metadata["stride"].split(",")))
    return PreviewDecoder(stride, int(metadata["channels"]), arrays["projection"], arrays["patches"])
