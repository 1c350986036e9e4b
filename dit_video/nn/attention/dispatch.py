"""Choice of the attention function for a platform and a pattern: the only place that resolves `auto`."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp

from dit_video.core.errors import UserError
from dit_video.core.platform.devices import Platform
from dit_video.nn.attention.api import Attention, AttentionInputs, Keys, Queries
from dit_video.nn.attention.chunked import ChunkedAttention, require_key_ranges
from dit_video.nn.attention.cudnn import MAX_HEAD_WIDTH, CudnnAttention
from dit_video.nn.attention.dense import DenseAttention
from dit_video.nn.attention.masks import Full, Pattern
from dit_video.nn.attention.splash import SplashAttention, SplashBlocks
from dit_video.nn.attention.tokamax import TokamaxAttention

BackendName = Literal["auto", "dense", "chunked", "splash", "cudnn", "tokamax"]
Backend = BackendName | SplashBlocks
"""Attention backend by name, or splash attention with these block sizes."""

ANY_PLATFORM = Platform()
"""Platform with attention in plain XLA, which runs everywhere and which the compiler can partition."""
_KERNEL_PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "tokamax": "gpu"}
_HOPPER, _AMPERE = (9, 0), (8, 0)


def make_attention(
    backend: Backend = "auto", *, pattern: Pattern = Full(), chunk: int = 256, platform: Platform = ANY_PLATFORM
) -> Attention:
    """Return the attention function of a backend.

    | backend | where | patterns | skips blocks | memory |
    |---|---|---|---|---|
    | `dense` | anywhere | all | no | quadratic |
    | `chunked` | anywhere | all | yes | linear |
    | `splash`, `SplashBlocks` | TPU | one key range | yes | linear |
    | `cudnn` | GPU, 16 bits | full, contiguous segments | yes | linear |
    | `cudnn` | GPU, 16 bits | all others | no | quadratic (mask) |
    | `tokamax` | GPU, if installed | one key range | forwards | linear |

    `choose_backend` resolves `auto` for each call, from the platform that the program is compiled for. The patterns
    whose queries see one range of keys are `Full`, `SpaceOnly`, `TimeOnly`, `CausalFrames`, and a `SlidingWindow` of
    radius 0. `chunk` is the block size of `chunked`; the kernels have their own.

    Raises:
      UserError: If the backend is unknown or does not support the pattern.
    """
    if isinstance(backend, SplashBlocks):
        return SplashAttention(pattern=pattern, blocks=backend)
    match backend:
        case "dense":
            return DenseAttention(pattern=pattern)
        case "chunked":
            return ChunkedAttention(pattern=pattern, chunk=chunk)
        case "auto":
            return AutoAttention(pattern=pattern, chunk=chunk, platform=platform)
        case "splash":
            return SplashAttention(pattern=pattern)
        case "cudnn":
            return CudnnAttention(pattern=pattern)
        case "tokamax":
            return TokamaxAttention(pattern=pattern)
    raise UserError(f"attention backend {backend!r} is unknown; use {', '.join(get_args(BackendName))}")


def check_attention(backend: Backend, *patterns: Pattern, biased: bool = False) -> None:
    """Check that a backend supports these patterns. It is not built, so this works on machines that lack it.

    Raises:
      UserError: If the backend does not support one of the patterns, or a bias of the scores.
    """
    name = get_backend_name(backend)
    if name in ("splash", "tokamax"):
        for pattern in patterns:
            require_key_ranges(pattern, name)
    if biased and name not in ("auto", "dense", "chunked"):
        raise UserError(f"{name} attention cannot add a bias to its scores; use the backend chunked or dense")


def get_backend_name(backend: Backend) -> BackendName:
    """Return the name of a backend that is given by name or by its settings."""
    return "splash" if isinstance(backend, SplashBlocks) else backend


def check_platform(backend: Backend, platform: Platform) -> None:
    """Check that a platform has the kernels of a backend.

    Raises:
      UserError: If the platform lacks the kernels.
    """
    name = get_backend_name(backend)
    if (needed := _KERNEL_PLATFORMS.get(name, platform.name)) != platform.name:
        raise UserError(
            f"attention={name!r} is invalid: its kernels are for {needed}, and the devices are {platform.name}. Use "
            "attention='auto', which takes the best one for the devices."
        )


def choose_backend(
    platform: Platform,
    pattern: Pattern,
    *,
    queries: int,
    keys: int,
    head_width: int,
    dtype: Any,
    segment_count: int | None,
    biased: bool = False,
    chunk: int = 256,
) -> BackendName:
    """Return the backend that `auto` stands for.

    - `dense` on every platform for up to `(4 chunk)²` scores per head, which no kernel computes faster;
    - `splash` on TPUs for patterns of one key range;
    - `cudnn` on NVIDIA GPUs if it can skip pairs of different segments: full attention in 16 bits, from Hopper on, or
      from Ampere on for rows of one segment;
    - `chunked` otherwise.

    Args:
      platform: Platform that the program is compiled for.
      pattern: Pattern of attention.
      queries: Number of queries in a row.
      keys: Number of keys in a row.
      head_width: Width of a head.
      dtype: Dtype of queries, keys and values.
      segment_count: See `AttentionInputs`.
      biased: True if a bias is added to the scores.
      chunk: Block size of `chunked`.
    """
    if queries * keys <= (4 * chunk) ** 2:
        return "dense"
    if biased:
        return "chunked"
    if platform.name == "tpu" and pattern.locality != "boxes":
        return "splash"
    if platform.compute_capability is not None and isinstance(pattern, Full) and segment_count is not None:
        has_kernel = platform.compute_capability >= (_AMPERE if segment_count == 1 else _HOPPER)
        max_width = MAX_HEAD_WIDTH if platform.compute_capability >= _HOPPER else 128
        is_supported = head_width % 8 == 0 and head_width <= max_width and jnp.dtype(dtype).itemsize == 2
        if has_kernel and is_supported:
            return "cudnn"
    return "chunked"


@dataclass(frozen=True, kw_only=True)
class AutoAttention:
    """Attention by the backend that `choose_backend` returns for the arguments of each call."""

    pattern: Pattern = Full()
    chunk: int = 256
    platform: Platform = ANY_PLATFORM

    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        backend = choose_backend(
            self.platform,
            self.pattern,
            queries=q.shape[1],
            keys=k.shape[1],
            head_width=q.shape[-1],
            dtype=q.dtype,
            segment_count=inputs.segment_count,
            biased=inputs.bias is not None,
            chunk=self.chunk,
        )
        return make_attention(backend, pattern=self.pattern, chunk=self.chunk)(q, k, v, inputs)
