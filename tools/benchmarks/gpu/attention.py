"""Attention over packed rows: equality and leaks, and the seconds against the share of pairs at several clips a row.

Attention without a mask computes all pairs of a row's tokens. Attention that skips those of two clips should take the
share `sum(n_i²) / N²` of its time, for clips of `n_i` tokens in a row of `N`. Each shape of offsets has a process of
its own: cuDNN's packed kernels have failed in processes with several.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import leaks
from benchmarks.gpu.figures import DETAILS, Case, Figure, count_clips
from benchmarks.timer import TimeBudget, time_repeated
from dit_video.core.platform.devices import get_default_platform
from dit_video.nn.attention import Attention, AttentionInputs, BackendName, check_platform, make_attention

BACKENDS: dict[str, BackendName] = {"gpu": "cudnn", "tpu": "splash", "cpu": "chunked"}
"""Backend of each platform that is measured."""
MODES = ("forward", "forward and backward")
_FLOPS_PER_PAIR = {"forward": 4, "forward and backward": 14}
"""Operations of the products for a pair of tokens, by channel; the backward pass counts 2.5 times as many."""
CLIP_COUNTS = (1, 4, 16)
"""Numbers of equally long clips of a row."""
MAX_RATIO = 1.15
"""Largest ratio of time to pair share that is aimed for."""
_RATES = (
    Figure(name="product of 8192x8192 matrices", unit="TFLOP/s"),
    # NVIDIA's own of cuDNN 9.19.1 on an H200, at 32,768 tokens, 64 heads with 8 of keys (cudnn-frontend, benchmark/
    # sdpa_benchmark_training/results): 693 forward and 572 backward, which together are 602.
    Figure(name="attention to all pairs, forward", unit="TFLOP/s", target="(693 on an H200)"),
    Figure(name="attention to all pairs, forward and backward", unit="TFLOP/s", target="(602 on an H200)"),
)


@dataclass(frozen=True, kw_only=True)
class AttentionSize:
    """Sizes of the rows."""

    tokens: int = 32_768
    heads: int = 16
    head_width: int = 128
    product: int = 8192
    """Side of the matrices whose product is measured, too."""
    repeats: int = 10
    """Number of measurements; their median counts."""
    checked: leaks.CheckedSize = field(default_factory=leaks.CheckedSize)
    """Sizes of the rows that are compared with the dense reference."""


SMALL = AttentionSize(
    tokens=256,
    heads=2,
    head_width=16,
    product=128,
    repeats=2,
    checked=leaks.CheckedSize(tokens=64, heads=2, head_width=16, text=24),
)


def list_cases(platform: str, size: AttentionSize) -> list[Case]:
    """Return the cases of the backend of a platform: equality and leaks for each kind of inputs, then the times."""
    backend = BACKENDS[platform]
    checks = [
        Case(
            name=f"equality and leaks of {backend}, {kind}",
            figures=leaks.list_figures(backend, kind),
            measure=functools.partial(_check, backend, kind, size),
        )
        for kind in leaks.KINDS
    ]
    times = [
        Case(
            name=f"times of {backend}, {count_clips(clips)}",
            figures=(
                *(_RATES if clips == 1 else ()),
                *(Figure(name=name_time(backend, clips, mode), target=f"<= {MAX_RATIO}") for mode in MODES),
            ),
            measure=functools.partial(measure_times, backend, clips, size),
        )
        for clips in CLIP_COUNTS
    ]
    return times[:1] + checks + times[1:]


def name_time(backend: str, clips: int, mode: str) -> str:
    """Return the name of the figure of a time relative to the pair share of attention's to all pairs."""
    return f"{backend}, {count_clips(clips)}, {mode}: time / (pair share x time of all pairs)"


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


def _check(backend: BackendName, kind: str, size: AttentionSize, budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    yield from leaks.check_backend(make_backend(backend), backend, kind, size.checked, budget)


def measure_times(
    backend: BackendName, clips: int, size: AttentionSize, budget: TimeBudget
) -> Iterator[tuple[str, Any]]:
    """Yield the ratios of time to pair share, of one clip also the rates of the card, and the seconds as details.

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
    yield DETAILS, {"seconds of all pairs": reference, "by": "cuDNN without a mask" if on_gpu else backend}
    if clips == 1:
        yield _RATES[0].name, 2 * size.product**3 / time_call(_make_product(size.product, dtype)) / 1e12
        flops = size.heads * size.head_width * size.tokens**2
        for figure, mode in zip(_RATES[1:], MODES, strict=True):
            yield figure.name, _FLOPS_PER_PAIR[mode] * flops / reference[mode] / 1e12
    lengths = divide_tokens(size.tokens, clips)
    share = compute_pair_share(lengths, size.tokens)
    for mode in MODES:
        budget.check()
        seconds = time_call(_make_call(attention, arrays, lengths, mode))
        yield DETAILS, {mode: {"seconds": seconds, "pair share": share}}
        yield name_time(backend, clips, mode), seconds / (share * reference[mode])


def _make_product(side: int, dtype: Any) -> Callable[[], Any]:
    matrices = [jax.random.normal(jax.random.key(number), (side, side), dtype) for number in range(2)]
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(*matrices)


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
