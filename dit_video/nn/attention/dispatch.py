"""Choice of the attention function for a backend and a pattern."""

from dataclasses import dataclass
from typing import Literal, get_args

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import Attention, Keys, Queries
from dit_video.nn.attention.backends.chunked import ChunkedAttention
from dit_video.nn.attention.backends.dense import DenseAttention
from dit_video.nn.attention.backends.gpu import CudnnAttention, TokamaxAttention
from dit_video.nn.attention.backends.splash import SplashAttention
from dit_video.nn.attention.inputs import AttentionInputs
from dit_video.nn.attention.key_ranges import require_key_ranges
from dit_video.nn.attention.masks import Full, Pattern

Backend = Literal["auto", "dense", "chunked", "splash", "cudnn", "tokamax"]


def make_attention(backend: Backend = "auto", *, pattern: Pattern = Full(), chunk: int = 256) -> Attention:
    """Return the attention function of a backend.

    | backend | where | patterns | skips blocks | memory |
    |---|---|---|---|---|
    | `dense` | anywhere | all | no | quadratic |
    | `chunked` | anywhere | all | yes | linear |
    | `splash` | TPU | one key range | yes | linear |
    | `cudnn` | GPU, 16 bits | all | no | quadratic (mask) |
    | `tokamax` | GPU, if installed | one key range | yes | linear |

    `auto` uses `dense` for rows of up to `4 * chunk` tokens and `chunked` above, on every platform: a kernel is only
    used if it is named, after it was measured. Patterns whose queries see one range of keys are `Full`, `SpaceOnly`,
    `TimeOnly`, `CausalFrames`, and a `SlidingWindow` of radius 0. `chunk` is the block size of `chunked`; the kernels
    have their own.

    Raises:
      UserError: an unknown backend, or a pattern that it cannot do.
    """
    match backend:
        case "dense":
            return DenseAttention(pattern=pattern)
        case "chunked":
            return ChunkedAttention(pattern=pattern, chunk=chunk)
        case "auto":
            dense, chunked = DenseAttention(pattern=pattern), ChunkedAttention(pattern=pattern, chunk=chunk)
            return AutoAttention(max_dense_tokens=4 * chunk, dense=dense, chunked=chunked)
        case "splash":
            return SplashAttention(pattern=pattern)
        case "cudnn":
            return CudnnAttention(pattern=pattern)
        case "tokamax":
            return TokamaxAttention(pattern=pattern)
    raise UserError(f"attention backend {backend!r} is unknown; use {', '.join(get_args(Backend))}")


def check_attention(backend: Backend, *patterns: Pattern, biased: bool = False) -> None:
    """Check that a backend supports these patterns, without building it, so also on machines that lack the backend.

    Raises:
      UserError: patterns, or a bias of the scores, that the backend does not support.
    """
    if backend in ("splash", "tokamax"):
        for pattern in patterns:
            require_key_ranges(pattern, backend)
    if biased and backend not in ("auto", "dense", "chunked"):
        raise UserError(f"{backend} attention cannot add a bias to its scores; use the backend chunked or dense")


@dataclass(frozen=True, kw_only=True)
class AutoAttention:
    """Attention that is dense for up to `max_dense_tokens`² scores, and chunked above."""

    max_dense_tokens: int
    dense: DenseAttention
    chunked: ChunkedAttention

    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        return (self.dense if q.shape[1] * k.shape[1] <= self.max_dense_tokens**2 else self.chunked)(q, k, v, inputs)
