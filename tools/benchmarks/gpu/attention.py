"""Attention over packed rows: the seconds of every backend against the share of pairs, at several clips a row.

Dense attention computes all pairs of a row's tokens. Attention that skips those of two clips should take the share
`sum(n_i²) / N²` of its time, for clips of `n_i` tokens in a row of `N`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import leaks
from benchmarks.gpu.figures import DETAILS, Case, Figure
from benchmarks.timer import TimeBudget, time_repeated
from dit_video.core.errors import UserError
from dit_video.core.platform.devices import Platform, get_default_platform
from dit_video.nn.attention import Attention, AttentionInputs, BackendName, check_platform, make_attention

BACKENDS: tuple[BackendName, ...] = ("cudnn", "splash", "tokamax", "chunked", "dense")
"""All backends, in the order in which they are measured."""
MODES = ("forward", "forward and backward")
CLIP_COUNTS = (1, 4, 10, 16)
"""Numbers of equally long clips of a row."""
MAX_RATIO = 1.15
"""Largest ratio of time to pair share that is aimed for."""


@dataclass(frozen=True, kw_only=True)
class AttentionSize:
    """Sizes of the rows."""

    tokens: int = 32_768
    heads: int = 16
    head_width: int = 128
    repeats: int = 10
    """Number of measurements; their median counts."""
    checked: leaks.CheckedSize = field(default_factory=leaks.CheckedSize)
    """Sizes of the rows that are compared with the dense reference."""


SMALL = AttentionSize(
    tokens=256, heads=2, head_width=16, repeats=2, checked=leaks.CheckedSize(tokens=64, heads=2, head_width=16, text=24)
)


def list_cases(platform: str, size: AttentionSize) -> list[Case]:
    """Return the cases of the backends of a platform: equality and leaks of each, then the times of each."""
    backends = [backend for backend in BACKENDS if _has_kernels(backend, platform)]
    checks = [
        Case(
            name=f"equality and leaks of {backend}",
            figures=leaks.list_figures(backend),
            measure=functools.partial(_check, backend, size),
        )
        for backend in backends
    ]
    times = [
        Case(
            name=f"times of {backend}",
            figures=tuple(
                Figure(
                    name=name_time(backend, clips, mode),
                    target=f"<= {MAX_RATIO}" if backend in ("cudnn", "splash") else "",
                )
                for clips in CLIP_COUNTS
                for mode in MODES
            ),
            measure=functools.partial(measure_times, backend, size),
        )
        for backend in backends
        if backend != "dense"  # It stores the scores of a row, which are more than a GPU holds.
    ]
    return checks + times


def _has_kernels(backend: BackendName, platform: str) -> bool:
    try:
        check_platform(backend, Platform(platform))
    except UserError:
        return False
    return True


def name_time(backend: str, clips: int, mode: str) -> str:
    """Return the name of the figure of a time relative to the pair share of dense attention's."""
    return f"{backend}, {clips} clip{'s' if clips > 1 else ''} a row, {mode}: time / (pair share x dense)"


def make_backend(backend: BackendName) -> Attention:
    """Return the attention of a backend.

    Raises:
      UserError: If this machine lacks the backend.
    """
    check_platform(backend, get_default_platform())
    return make_attention(backend)


def divide_tokens(tokens: int, clips: int) -> np.ndarray:
    """Return the lengths of clips that fill a row, which differ by one token at most."""
    return np.asarray([tokens // clips + (index < tokens % clips) for index in range(clips)])


def compute_pair_share(lengths: Sequence[int] | np.ndarray, tokens: int) -> float:
    """Return the share of the pairs of a row's tokens that lie in one clip."""
    return float(np.sum(np.square(np.asarray(lengths, float))) / tokens**2)


def _check(backend: BackendName, size: AttentionSize, budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    yield from leaks.check_backend(make_backend(backend), backend, size.checked, budget)


def measure_times(backend: BackendName, size: AttentionSize, budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    """Yield the ratios of time to pair share, and the seconds as details.

    Raises:
      UserError: If this machine lacks the backend.
    """
    attention, platform = make_backend(backend), jax.default_backend()
    on_gpu, dtype = platform == "gpu", jnp.float32 if platform == "cpu" else jnp.bfloat16
    shape = (1, size.tokens, size.heads, size.head_width)
    arrays = [jax.random.normal(jax.random.key(number), shape, dtype) for number in range(4)]
    time_call = functools.partial(time_repeated, budget=budget, repeats=size.repeats)
    dense = _attend_to_all if on_gpu else attention
    reference = {mode: time_call(_make_call(dense, arrays, [size.tokens], mode)) for mode in MODES}
    yield DETAILS, {"dense seconds": reference, "dense by": "cuDNN without a mask" if on_gpu else backend}
    for clips in CLIP_COUNTS:
        lengths = divide_tokens(size.tokens, clips)
        share = compute_pair_share(lengths, size.tokens)
        for mode in MODES:
            budget.check()
            seconds = time_call(_make_call(attention, arrays, lengths, mode))
            yield DETAILS, {f"{clips} clips, {mode}": {"seconds": seconds, "pair share": share}}
            yield name_time(backend, clips, mode), seconds / (share * reference[mode])


def _make_call(
    attention: Callable[..., Any], arrays: Sequence[jax.Array], lengths: Sequence[int] | np.ndarray, mode: str
) -> Callable[[], Any]:
    segments = jnp.asarray(np.repeat(np.arange(len(lengths)) + 1, lengths)[None], jnp.int32)
    inputs = AttentionInputs.self_attention(segments, segment_count=len(lengths))

    @jax.jit
    def attend(q, k, v, d_out, inputs):
        if mode == "forward":
            return attention(q, k, v, inputs)
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, inputs), q, k, v)
        return out, back(d_out)

    return lambda: attend(*arrays, inputs)


def _attend_to_all(q: jax.Array, k: jax.Array, v: jax.Array, inputs: AttentionInputs) -> jax.Array:
    """Call cuDNN's attention without a mask, its fastest, which is exact for a row of one clip."""
    del inputs
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
