"""Causal convolution over (t, h, w): an output frame sees its own and earlier frames only.

A clip may be given whole or in chunks, one after the other. What a layer needs of the chunks before goes through a
`Memory`, so that the chunks' outputs are those of the whole clip.
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

from dit_video.nn.cpu.im2col import LIMIT, columns, frame_bytes
from dit_video.nn.cpu.winograd import winograd
from dit_video.nn.linear import Init, initial

Past = Literal["first", "zero"]
"""What lies before a clip: its first frame, again and again, or zeros."""
Form = Literal["auto", "offsets", "stacked", "winograd", "columns", "native"]
"""How a convolution is computed; see `CausalConv`."""

_NARROW = 48
"""Channels below which the CPU stacks time offsets: measured at 32 (1.6 times faster) and 64 (1.2 times slower)."""
_WIDE, _LARGE = 96, 1024
"""Channels and places of a frame from which on fewer products take less time on CPU: measured at 96 channels (128x128:
1.2 times faster, 3 times with gradients), 192 (64x64: 1.6 and 2.1), 384 (32x32: 1.3 and 1.6; 16x16: 0.4 and 0.8)."""


class Memory:
    """What causal layers keep of a chunk of a clip for the next one, in the order in which they are called.

    One object serves one call of a model on one chunk: `Memory()` for a clip's first chunk, `Memory(before.kept)` for
    those that follow. `kept` is a tuple of arrays, so that it can leave and enter `jax.jit`.
    """

    def __init__(self, past: Sequence[Array] | None = None):
        self.begins = past is None
        """whether this is the clip's first chunk"""
        self._past: list[Array] = list(past or ())
        self._kept: list[Array] = []

    @property
    def kept(self) -> tuple[Array, ...]:
        """What the next chunk needs."""
        return tuple(self._kept)

    def exchange(self, start: Array, chunk: Array) -> Array:
        """A chunk with what was kept of the one before, or with `start` if there is none; its end is kept.

        Args:
          start: `n` frames that lie before the clip.
          chunk: any number of frames, none too.

        Returns:
          `n` frames, and the chunk after them.
        """
        frames = start.shape[1]
        longer = jnp.concatenate([start if self.begins else self._past.pop(0), chunk], axis=1)
        self._kept.append(longer[:, longer.shape[1] - frames :])
        return longer


def choose_form(module: nnx.Module, form: Form) -> None:
    """Compute all convolutions of a module in one form; see `CausalConv`."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, CausalConv):
            part.form = form


def with_past(
    x: Float[Array, "B t h w i"], frames: int, memory: Memory | None, past: Past
) -> Float[Array, "B _ h w i"]:
    """A clip, or a chunk of one, with the `frames` frames that come before it."""
    if frames == 0:
        return x
    start = jnp.repeat(x[:, :1], frames, axis=1)
    if past == "zero":
        start = jnp.zeros_like(start)
    return jnp.concatenate([start, x], axis=1) if memory is None else memory.exchange(start, x)


class CausalConv(nnx.Module):
    """A 3-D convolution, zero-padded in space: of odd kernel, or with `stride` 2 of a size from 2 on.

    In time it is padded with the clip's first frame (`past="first"`: an image is then the same as a still video), or
    with zeros. With `stride` 2 height and width are halved; the padding of a kernel of 3 is then below and to the right
    alone, as Stable Diffusion's autoencoder has it, that of a kernel of 4 on both sides.

    `form` chooses how it is computed: `offsets` as one 2-D convolution for each time offset, summed; `stacked` as one
    2-D convolution over the offsets as channels; `winograd` as `offsets`, with fewer products; `columns` as one product
    of matrices, where kernels are odd and no place is left out; `native` as a 3-D convolution, whose backward pass is
    2.4 times slower on XLA's CPU; `auto` takes what was measured fastest on CPU for the size, and `native` elsewhere,
    where nothing was measured yet. In bfloat16 products are summed in float32 and rounded once.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, int, int],
        *,
        stride: Literal[1, 2] = 1,
        past: Past = "first",
        form: Form = "auto",
        init: Init = "xavier",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        volume = kernel[0] * kernel[1] * kernel[2]
        shape = (*kernel, channels_in, channels_out)
        fan = (volume * channels_in, volume * channels_out)
        self.kernel = nnx.Param(initial(init, rngs.params(), shape, fan=fan))
        self.bias = nnx.Param(jnp.zeros((channels_out,), jnp.float32))
        self.stride, self.past, self.form, self.dtype = stride, past, form, dtype

    def __call__(self, x: Float[Array, "B t h w i"], memory: Memory | None = None) -> Float[Array, "B t _ _ o"]:
        padded = with_past(x.astype(self.dtype), self.kernel.shape[0] - 1, memory, self.past)
        return self.valid(padded)

    def valid(self, x: Float[Array, "B _ h w i"], *, step: int = 1) -> Float[Array, "B _ _ _ o"]:
        """Without padding in time: an output for every `step`-th run of as many frames as the kernel has."""
        if self._is_of_columns(x, step):
            return columns(x, self.kernel[...], self.bias[...], self.dtype).astype(self.dtype)
        kernel = jnp.asarray(self.kernel[...], self.dtype)
        x = x.astype(self.dtype)
        length = (x.shape[1] - kernel.shape[0]) // step + 1
        last = (length - 1) * step + 1
        offsets = [x[:, offset : offset + last : step] for offset in range(kernel.shape[0])]
        match self._form():
            case "native":
                y = self._native(x, kernel, step)
            case "stacked":
                merged = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
                y = self._spatial(jnp.concatenate(offsets, axis=-1), merged)
            case _ if len(offsets) == 1:
                y = self._spatial(offsets[0], kernel[0])
            case _:
                parts = [self._spatial(x, kernel[offset], sums=jnp.float32) for offset, x in enumerate(offsets)]
                y = functools.reduce(operator.add, parts).astype(self.dtype)
        return y + self.bias[...].astype(self.dtype)

    def _is_of_columns(self, x: Float[Array, "B _ h w i"], step: int) -> bool:
        """Whether `columns` computes this convolution. Of a frame's size alone, so that all chunks of a clip agree."""
        _, *size, _, _ = self.kernel.shape
        if self.stride != 1 or step != 1 or not all(length % 2 for length in size):
            return False
        if self.form != "auto":
            return self.form == "columns"
        held = self.kernel.shape[0] * frame_bytes(x.shape[2:], size, self.dtype)
        return self.dtype == jnp.bfloat16 and held <= LIMIT and jax.default_backend() == "cpu"

    def _form(self) -> Form:
        if self.form != "auto":
            return self.form
        if self.kernel.shape[0] == 1:
            return "offsets"
        if jax.default_backend() != "cpu":
            return "native"
        return "stacked" if self.kernel.shape[3] < _NARROW else "offsets"

    def _spatial(
        self, x: Float[Array, "B t h w i"], kernel: Float[Array, "kh kw i o"], *, sums: DTypeLike | None = None
    ) -> Float[Array, "B t _ _ o"]:
        """A 2-D convolution of every frame; what it adds up is given as `sums`, in the kernel's dtype by default."""
        if kernel.shape[:2] == (1, 1):
            y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0], preferred_element_type=sums)
            return y.reshape(*x.shape[:-1], kernel.shape[-1])
        batch, length = x.shape[:2]
        pictures = x.reshape(batch * length, *x.shape[2:])
        if self._saves_products(x, kernel):
            y = winograd(pictures, kernel)
            return y.reshape(batch, length, *y.shape[1:])
        y = jax.lax.conv_general_dilated(
            pictures,
            kernel,
            (self.stride, self.stride),
            self._padding(kernel.shape[:2]),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=sums,
        )
        return y.reshape(batch, length, *y.shape[1:])

    def _saves_products(self, x: Float[Array, "B t h w i"], kernel: Float[Array, "kh kw i o"]) -> bool:
        """Whether `winograd` computes this convolution. Of a frame's size alone, so that all chunks of a clip agree."""
        if kernel.shape[:2] != (3, 3) or self.stride != 1 or self.dtype != jnp.float32:
            return False
        if self.form != "auto":
            return self.form == "winograd"
        large = x.shape[2] * x.shape[3] >= _LARGE and min(kernel.shape[2:]) >= _WIDE
        return large and jax.default_backend() == "cpu"

    def _native(self, x: Float[Array, "B t h w i"], kernel: Array, step: int) -> Float[Array, "B _ _ _ o"]:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (step, self.stride, self.stride),
            ((0, 0), *self._padding(kernel.shape[1:3])),
            dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
        )

    def _padding(self, kernel: tuple[int, ...]) -> list[tuple[int, int]]:
        left = [size - self.stride for size in kernel]  # how much larger than a step it is
        return [(size // 2, size - size // 2) if size > 0 else (0, 0) for size in left]
