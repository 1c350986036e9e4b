"""Equality of attention backends with the dense reference, and leaks between clips, on the device.

The rows hold padding, one clip, no first clip, and none; in cross-attention texts are shortened, missing, or of absent
clips. The reference is dense attention in float32, with products of full precision, of the same values. Where nothing
leaks, the outputs and gradients of a clip are equal bit for bit whatever the other tokens hold. Kernels whose sums
depend on the order of their threads differ from run to run; there a change must not exceed that difference.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.figures import DETAILS, Figure
from benchmarks.timer import TimeBudget
from dit_video.nn.attention import Attention, AttentionInputs, ContiguousSegments
from dit_video.nn.attention.dense import DenseAttention

MAX_ERRORS = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest difference from the reference, relative to its largest value: about 100 roundings of float32, and 5 of
bfloat16, in which backends round the scores' exponentials, the result and the gradients."""
KINDS = ("self, several clips", "cross, several clips", "self, one clip", "cross, one clip")
"""Kinds of inputs: self-attention and cross-attention, with several clips a row and with one."""
HALF_PRECISION = ("cudnn",)
"""Backends without float32."""
SKIPPING = ("cudnn",)
"""Backends that promise not to read the tokens of other clips at all."""
_RUNS = 3
"""Number of equal runs that show how much a kernel's results differ by themselves."""
Others = Literal["large", "not finite"]
"""Values that replace all tokens' but one clip's."""


@dataclass(frozen=True, kw_only=True)
class CheckedSize:
    """Sizes of the rows that are compared."""

    tokens: int = 2048
    heads: int = 4
    head_width: int = 128
    text: int = 512
    """Number of text tokens of a row."""


def list_figures(backend: str, kind: str) -> tuple[Figure, ...]:
    """Return the figures of a backend for a kind of inputs."""
    figures = []
    for dtype in list_dtypes(backend):
        figures.append(Figure(name=name_error(backend, kind, dtype), target=f"<= {MAX_ERRORS[dtype]:g}"))
        figures += [
            Figure(name=name_leaks(backend, kind, dtype, others), target="0") for others in list_others(backend)
        ]
    return tuple(figures)


def list_dtypes(backend: str) -> tuple[str, ...]:
    return ("bfloat16",) if backend in HALF_PRECISION else ("float32", "bfloat16")


def list_others(backend: str) -> tuple[Others, ...]:
    return ("large", "not finite") if backend in SKIPPING else ("large",)


def name_error(backend: str, kind: str, dtype: str) -> str:
    return f"{backend}, {kind}, {dtype}: largest error of values and gradients, relative to the largest"


def name_leaks(backend: str, kind: str, dtype: str, others: Others) -> str:
    return f"{backend}, {kind}, {dtype}: values and gradients of a clip that depend on others that are {others}"


def make_inputs(size: CheckedSize) -> dict[str, AttentionInputs]:
    """Return the inputs of each of `KINDS`."""
    tokens, text = size.tokens, size.text
    segments = np.zeros((4, tokens), np.int32)
    first, second = tokens * 5 // 16 - 1, tokens * 13 // 16 - 3  # not aligned to blocks
    third = tokens * 15 // 16 + 1
    segments[0, :third] = np.repeat([1, 2, 3], [first, second - first, third - second])
    segments[1] = 1
    segments[2] = np.repeat([2, 3], [first, tokens - first])
    texts = np.zeros((4, text), np.int32)
    quarter = text // 4
    texts[0, : 2 * quarter] = 1
    texts[0, 2 * quarter + 1 : 3 * quarter] = 2  # the third clip has none
    texts[1, : quarter - 1] = 1
    texts[2] = np.repeat([1, 2, 3, 4], [quarter, quarter, quarter, text - 3 * quarter])
    texts[3, :quarter] = 1
    results = {}
    for count, kind in ((4, "several clips"), (1, "one clip")):
        ids = [jnp.asarray(np.where(each <= count, each, 0), jnp.int32) for each in (segments, texts)]
        contiguous = ContiguousSegments(count)
        results[f"self, {kind}"] = AttentionInputs(ids[0], contiguous=contiguous)
        results[f"cross, {kind}"] = AttentionInputs(ids[0], ids[1], contiguous=contiguous)
    return results


def draw_arrays(size: CheckedSize, inputs: AttentionInputs, dtype: Any) -> list[jax.Array]:
    """Return queries, keys, values and the gradient of the output."""
    lengths = (inputs.q_segments, inputs.kv_segments, inputs.kv_segments, inputs.q_segments)
    return [
        jax.random.normal(jax.random.key(number), (*ids.shape, size.heads, size.head_width), dtype)
        for number, ids in enumerate(lengths)
    ]


def check_backend(
    attention: Attention, backend: str, kind: str, size: CheckedSize, budget: TimeBudget
) -> Iterator[tuple[str, Any]]:
    """Yield the errors and the leaks of a backend for a kind of inputs."""
    inputs = make_inputs(size)[kind]
    clip = int(inputs.contiguous is not None and inputs.contiguous.count > 1) + 1
    for dtype in list_dtypes(backend):
        arrays = draw_arrays(size, inputs, dtype)
        budget.check()
        yield name_error(backend, kind, dtype), measure_error(attention, arrays, inputs)
        for others in list_others(backend):
            budget.check()
            found = count_leaks(attention, arrays, inputs, clip=clip, others=others)
            yield DETAILS, {f"{dtype}, {others}": found._asdict()}
            yield name_leaks(backend, kind, dtype, others), found.number


def measure_error(attention: Attention, arrays: Sequence[jax.Array], inputs: AttentionInputs) -> float:
    """Return the largest difference from the dense reference, of output and gradients, relative to their largest."""
    exact = [x.astype(jnp.float32) for x in arrays]
    with jax.default_matmul_precision("highest"):
        expected = compute_gradients(DenseAttention(), exact, inputs)
        result = compute_gradients(attention, arrays, inputs)
    ratios = [np.abs(one - other).max() / np.abs(other).max() for one, other in zip(result, expected, strict=True)]
    return float(np.max(np.nan_to_num(ratios, nan=np.inf)))


class Leaks(NamedTuple):
    """Values of a clip that depend on other tokens."""

    number: int
    """Number of such values, of output and gradients."""
    spread: float
    """Largest difference between equal runs; 0 for a kernel that computes the same bits each time."""


def count_leaks(
    attention: Attention, arrays: Sequence[jax.Array], inputs: AttentionInputs, *, clip: int, others: Others
) -> Leaks:
    """Count the values of a clip's output and gradients that change when all other tokens do.

    Args:
      attention: The backend.
      arrays: Queries, keys, values and the gradient of the output.
      inputs: Segments of queries and keys.
      clip: Segment id of the clip.
      others: Values of the other tokens: finite ones that would change every result, or NaN and infinity.
    """
    own = [np.asarray(ids == clip) for ids in (inputs.q_segments, inputs.kv_segments)]
    own = [own[0], own[1], own[1], own[0]]
    changed = [
        jnp.where(jnp.asarray(mask)[..., None, None], x, _draw_others(x, number, others))
        for number, (x, mask) in enumerate(zip(arrays, own, strict=True))
    ]
    runs = [compute_gradients(attention, arrays, inputs) for _ in range(_RUNS)]
    after = compute_gradients(attention, changed, inputs)
    masks = (own[0], own[0], own[1], own[1])  # of output, and gradients of queries, keys and values
    count, largest = 0, 0.0
    for index, mask in enumerate(masks):
        first, *repeated = (run[index][mask] for run in runs)
        spread = max((float(np.abs(each - first).max(initial=0.0)) for each in repeated), default=0.0)
        # Runs differ from the first one by up to the spread, and so from each other by up to twice as much.
        count += int((~(np.abs(after[index][mask] - first) <= 2 * spread)).sum())
        largest = max(largest, spread)
    return Leaks(count, largest)


def _draw_others(x: jax.Array, number: int, others: Others) -> jax.Array:
    if others == "large":
        return 50 * jax.random.normal(jax.random.key(100 + number), x.shape, x.dtype) + 7
    index = jnp.arange(x.size).reshape(x.shape) % 3
    return jnp.where(index == 0, jnp.nan, jnp.where(index == 1, jnp.inf, -jnp.inf)).astype(x.dtype)


def compute_gradients(attention: Attention, arrays: Sequence[jax.Array], inputs: AttentionInputs) -> list[np.ndarray]:
    """Return the output, and the gradients of queries, keys and values, in float32."""
    return [np.asarray(x) for x in _differentiate(attention, list(arrays), inputs)]


@functools.partial(jax.jit, static_argnums=0)
def _differentiate(attention: Attention, arrays: list[jax.Array], inputs: AttentionInputs) -> list[jax.Array]:
    *qkv, d_out = arrays
    out, back = jax.vjp(lambda q, k, v: attention(q, k, v, inputs), *qkv)
    return [x.astype(jnp.float32) for x in (out, *back(d_out.astype(out.dtype)))]
