"""Causal convolution over (t, h, w): an output frame depends on its own and earlier frames only.

A clip can be processed whole, or in consecutive chunks. A `ConvCache` hands over the earlier frames that a layer needs,
so that the chunks yield the same outputs as the whole clip.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dit_video.nn.cpu.convolution import MAX_COLUMN_BYTES, compute_column_bytes, im2col_conv, winograd_conv
from dit_video.nn.layers import Init, init_weights

TemporalPadding = Literal["first", "zero"]
"""Padding in time before a clip: its first frame repeated, or zeros."""
ConvForm = Literal["auto", "offsets", "stacked", "winograd", "columns", "native"]
"""Form in which a convolution is computed; see `CausalConv`."""

_MIN_OFFSETS_CHANNELS = 48
"""Smallest number of input channels at which the CPU sums over time offsets instead of stacking them. Stacking was
measured 1.6 times faster at 32 channels and 1.2 times slower at 64."""
_MIN_WINOGRAD_CHANNELS, _MIN_WINOGRAD_PIXELS = 96, 1024
"""Smallest numbers of channels and of pixels per frame at which Winograd is faster on CPU. Measured speedup without and
with gradients: 96 channels at 128x128: 1.2 and 3; 192 at 64x64: 1.6 and 2.1; 384 at 32x32: 1.3 and 1.6, and at 16x16:
0.4 and 0.8."""


class ConvCache:
    """A cache of the last input frames of every causal layer, in the order in which the layers are called.

    One object serves one call of a model on one chunk: `ConvCache()` for a clip's first chunk,
    `ConvCache(previous.features)` for the next ones. `features` is a tuple of arrays, so it can cross `jax.jit`.
    """

    def __init__(self, previous: Sequence[Array] | None = None):
        self.is_first = previous is None
        """True for the first chunk of a clip."""
        self._previous: list[Array] = list(previous or ())
        self._features: list[Array] = []

    @property
    def features(self) -> tuple[Array, ...]:
        """Return the frames that the next chunk needs, one array per layer."""
        return tuple(self._features)

    def prepend(self, padding: Array, chunk: Array) -> Array:
        """Prepend the frames cached from the previous chunk, and cache the last ones for the next chunk.

        Args:
          padding: `n` frames, prepended to the clip's first chunk.
          chunk: Any number of frames, including zero.

        Returns:
          `n` frames, followed by the chunk.
        """
        frames = padding.shape[1]
        longer = jnp.concatenate([padding if self.is_first else self._previous.pop(0), chunk], axis=1)
        self._features.append(longer[:, longer.shape[1] - frames :])
        return longer


def set_conv_form(module: nnx.Module, form: ConvForm) -> None:
    """Set the form of all convolutions in a module; see `CausalConv`."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, CausalConv):
            part.form = form


def pad_in_time(
    x: Float[Array, "B t h w i"], frames: int, cache: ConvCache | None, temporal_padding: TemporalPadding
) -> Float[Array, "B _ h w i"]:
    """Prepend `frames` frames: padding for a whole clip or a first chunk, cached ones for a later chunk."""
    if frames == 0:
        return x
    start = jnp.repeat(x[:, :1], frames, axis=1)
    if temporal_padding == "zero":
        start = jnp.zeros_like(start)
    return jnp.concatenate([start, x], axis=1) if cache is None else cache.prepend(start, x)


class CausalConv(nnx.Module):
    """A causal 3-D convolution with zero padding in space; kernels are odd or, with `stride` 2, of any size from 2 on.

    In time it is padded with the clip's first frame (`temporal_padding="first"`: an image then equals a still video) or
    with zeros. With `stride` 2 height and width are halved; a kernel of 3 is then padded below and to the right only,
    as in Stable Diffusion's autoencoder, and a kernel of 4 on both sides.

    `form` is how the convolution is computed, one of:

    - `offsets`: one 2-D convolution per time offset, summed;
    - `stacked`: one 2-D convolution with the time offsets as channels;
    - `winograd`: like `offsets`, with fewer products;
    - `columns`: one matrix product (im2col), for odd kernels and stride 1;
    - `native`: a 3-D convolution, whose backward pass is 2.4 times slower in XLA on CPU;
    - `auto`: the fastest measured on CPU for the size, and `native` on other platforms, which were not measured yet.

    In bfloat16 products are summed in float32 and rounded once.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, int, int],
        *,
        stride: Literal[1, 2] = 1,
        temporal_padding: TemporalPadding = "first",
        form: ConvForm = "auto",
        init: Init = "xavier",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        volume = kernel[0] * kernel[1] * kernel[2]
        shape = (*kernel, channels_in, channels_out)
        fan = (volume * channels_in, volume * channels_out)
        self.kernel = nnx.Param(init_weights(init, rngs.params(), shape, fan=fan))
        self.bias = nnx.Param(jnp.zeros((channels_out,), jnp.float32))
        self.stride, self.temporal_padding, self.form, self.dtype = stride, temporal_padding, form, dtype

    def __call__(self, x: Float[Array, "B t h w i"], cache: ConvCache | None = None) -> Float[Array, "B t _ _ o"]:
        padded = pad_in_time(x.astype(self.dtype), self.kernel.shape[0] - 1, cache, self.temporal_padding)
        return self.convolve_valid(padded)

    def convolve_valid(self, x: Float[Array, "B _ h w i"], *, step: int = 1) -> Float[Array, "B _ _ _ o"]:
        """Convolve without padding in time, with a stride of `step` frames."""
        if self._uses_im2col(x, step):
            return im2col_conv(x, self.kernel[...], self.bias[...], self.dtype).astype(self.dtype)
        kernel = jnp.asarray(self.kernel[...], self.dtype)
        x = x.astype(self.dtype)
        length = (x.shape[1] - kernel.shape[0]) // step + 1
        last = (length - 1) * step + 1
        offsets = [x[:, offset : offset + last : step] for offset in range(kernel.shape[0])]
        match self._choose_form():
            case "native":
                y = self._convolve_3d(x, kernel, step)
            case "stacked":
                merged = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
                y = self._convolve_frames(jnp.concatenate(offsets, axis=-1), merged)
            case _ if len(offsets) == 1:
                y = self._convolve_frames(offsets[0], kernel[0])
            case _:
                parts = [self._convolve_frames(x, kernel[i], output_dtype=jnp.float32) for i, x in enumerate(offsets)]
                y = functools.reduce(operator.add, parts).astype(self.dtype)
        return y + self.bias[...].astype(self.dtype)

    def _uses_im2col(self, x: Float[Array, "B _ h w i"], step: int) -> bool:
        """Return True for im2col; this depends on the frame size alone, so that all chunks of a clip agree."""
        _, *size, _, _ = self.kernel.shape
        if self.stride != 1 or step != 1 or not all(length % 2 for length in size):
            return False
        if self.form != "auto":
            return self.form == "columns"
        column_bytes = self.kernel.shape[0] * compute_column_bytes(x.shape[2:], size, self.dtype)
        return self.dtype == jnp.bfloat16 and column_bytes <= MAX_COLUMN_BYTES and jax.default_backend() == "cpu"

    def _choose_form(self) -> ConvForm:
        if self.form != "auto":
            return self.form
        if self.kernel.shape[0] == 1:
            return "offsets"
        if jax.default_backend() != "cpu":
            return "native"
        return "stacked" if self.kernel.shape[3] < _MIN_OFFSETS_CHANNELS else "offsets"

    def _convolve_frames(
        self, x: Float[Array, "B t h w i"], kernel: Float[Array, "kh kw i o"], *, output_dtype: DTypeLike | None = None
    ) -> Float[Array, "B t _ _ o"]:
        """Convolve every frame in space; the output dtype is the kernel's by default."""
        if kernel.shape[:2] == (1, 1):
            y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0], preferred_element_type=output_dtype)
            return y.reshape(*x.shape[:-1], kernel.shape[-1])
        batch, length = x.shape[:2]
        frames = x.reshape(batch * length, *x.shape[2:])
        if self._uses_winograd(x, kernel):
            y = winograd_conv(frames, kernel)
            return y.reshape(batch, length, *y.shape[1:])
        y = jax.lax.conv_general_dilated(
            frames,
            kernel,
            (self.stride, self.stride),
            self._compute_padding(kernel.shape[:2]),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=output_dtype,
        )
        return y.reshape(batch, length, *y.shape[1:])

    def _uses_winograd(self, x: Float[Array, "B t h w i"], kernel: Float[Array, "kh kw i o"]) -> bool:
        """Return True for Winograd; this depends on the frame size alone, so that all chunks of a clip agree."""
        if kernel.shape[:2] != (3, 3) or self.stride != 1 or self.dtype != jnp.float32:
            return False
        if self.form != "auto":
            return self.form == "winograd"
        large = x.shape[2] * x.shape[3] >= _MIN_WINOGRAD_PIXELS and min(kernel.shape[2:]) >= _MIN_WINOGRAD_CHANNELS
        return large and jax.default_backend() == "cpu"

    def _convolve_3d(self, x: Float[Array, "B t h w i"], kernel: Array, step: int) -> Float[Array, "B _ _ _ o"]:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (step, self.stride, self.stride),
            ((0, 0), *self._compute_padding(kernel.shape[1:3])),
            dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
        )

    def _compute_padding(self, kernel: tuple[int, ...]) -> list[tuple[int, int]]:
        totals = [size - self.stride for size in kernel]  # both sides together
        return [(size // 2, size - size // 2) if size > 0 else (0, 0) for size in totals]
