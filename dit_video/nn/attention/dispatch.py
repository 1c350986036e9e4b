"""The attention function of a backend and a pattern."""

from dataclasses import dataclass
from typing import Literal

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import Attention, Keys, Queries
from dit_video.nn.attention.backends.chunked import Chunked
from dit_video.nn.attention.backends.dense import Dense
from dit_video.nn.attention.backends.gpu import Cudnn, Tokamax
from dit_video.nn.attention.backends.splash import Splash
from dit_video.nn.attention.key_ranges import require_stretches
from dit_video.nn.attention.masks import Full, Pattern
from dit_video.nn.attention.tokens import Tokens

Backend = Literal["auto", "dense", "chunked", "splash", "cudnn", "tokamax"]


def make_attention(backend: Backend = "auto", *, pattern: Pattern = Full(), chunk: int = 256) -> Attention:
    """The attention function of a backend.

    | backend | where | patterns | skips blocks | memory |
    |---|---|---|---|---|
    | `dense` | anywhere | all | no | quadratic |
    | `chunked` | anywhere | all | yes | linear |
    | `splash` | TPU | of one stretch | yes | linear |
    | `cudnn` | GPU, 16 bits | all | no | quadratic (mask) |
    | `tokamax` | GPU, if installed | of one stretch | yes | linear |

    `auto` takes `dense` for rows of up to `4 * chunk` tokens and `chunked` above, on every platform: a kernel is for
    those to name who have measured it. Patterns of one stretch are `Full`, `SpaceOnly`, `TimeOnly`, `CausalFrames`, and
    a `SlidingWindow` of radius 0. `chunk` is the block of `chunked`; the kernels have their own.

    Raises:
      UserError: an unknown backend, or a pattern that it cannot do.
    """
    match backend:
        case "dense":
            return Dense(pattern=pattern)
        case "chunked":
            return Chunked(pattern=pattern, chunk=chunk)
        case "auto":
            return Auto(limit=4 * chunk, short=Dense(pattern=pattern), long=Chunked(pattern=pattern, chunk=chunk))
        case "splash":
            return Splash(pattern=pattern)
        case "cudnn":
            return Cudnn(pattern=pattern)
        case "tokamax":
            return Tokamax(pattern=pattern)
    raise UserError(
        f"unknown attention backend {backend!r}; use auto, dense, chunked, splash (TPU), cudnn or tokamax (GPU)"
    )


@dataclass(frozen=True)
class Chosen:
    """The attention functions of a model, by pattern: those of its backend.

    A model has one of these; another function of a pattern in its place computes attention in another way, or watches.
    """

    backend: Backend

    def __call__(self, pattern: Pattern) -> Attention:
        return make_attention(self.backend, pattern=pattern)


def check_attention(backend: Backend, *patterns: Pattern, biased: bool = False) -> None:
    """What can be said of an attention before it is made, on machines that do not have the backend too.

    Raises:
      UserError: patterns, or a bias of the scores, that the backend cannot do.
    """
    if backend in ("splash", "tokamax"):
        for pattern in patterns:
            require_stretches(pattern, backend)
    if biased and backend not in ("auto", "dense", "chunked"):
        raise UserError(f"{backend} attention cannot add a bias to its scores; use the backend chunked or dense")


@dataclass(frozen=True, kw_only=True)
class Auto:
    """`short` where there are no more scores than among `limit` tokens, `long` above."""

    limit: int
    short: Dense
    long: Chunked

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        return (self.short if q.shape[1] * k.shape[1] <= self.limit**2 else self.long)(q, k, v, at)
