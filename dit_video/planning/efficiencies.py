"""Shares of the chips' peak rates that are reached, by chip and kind of work: published, or measured by calibration.

A kind of work without a published measurement is not in the table: nothing is guessed.
"""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.platform.chips import CHIPS, Chip, find_chip
from dit_video.nn.attention import AttentionInputs, BackendName, make_attention
from dit_video.planning.costs import StepSpec
from dit_video.planning.roofline import COLLECTIVES, MEMORY, PRODUCTS, Efficiencies, Efficiency, name_attention_work


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A chip and its measured efficiencies, as stored in a file."""

    chip: Chip
    measured: Efficiencies

    def write(self, folder: Path) -> Path:
        """Write the calibration into a folder, instead of an older one of the same chip, and return its file."""
        path = folder / f"{self.chip.name}.json"
        efficiencies = {
            work: {"share": each.share, "source": each.source} for work, each in self.measured.by_work.items()
        }
        document: dict[str, Any] = {"efficiencies": efficiencies}
        if self.chip.name not in CHIPS:
            names = ("name", "kind", "flops", "memory", "bandwidth", "link_bandwidth", "source")
            document["chip"] = {name: getattr(self.chip, name) for name in names}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)
        return path


def find_efficiencies(chip: Chip, calibration: Calibration | None = None) -> Efficiencies:
    """Return the efficiencies of a chip: measured ones, and published ones where there are none."""
    published = PUBLISHED_EFFICIENCIES.get(chip.name, Efficiencies())
    return published if calibration is None else published.update(calibration.measured)


def get_calibration_folder() -> Path:
    """Return the default folder of calibrations: `dit_video/calibration` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_video" / "calibration"


def read_calibration(folder: Path, name: str) -> Calibration | None:
    """Read the calibration of a chip, or of "cpu"; None if there is none.

    Raises:
      UserError: If the file is not a calibration.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    try:
        document = read_json(path)
        chip = CHIPS[name] if name in CHIPS else Chip(**document["chip"])
        by_work = {
            work: Efficiency(share=float(each["share"]), source=str(each["source"]))
            for work, each in document["efficiencies"].items()
        }
        if any(not each.share > 0 for each in by_work.values()):
            raise ValueError("a share is not positive")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fix = "Remove it, or use tools/plan.py --calibrate to write it again"
        raise UserError(f"{path} is invalid: it must be a calibration ({error}). {fix}") from error
    return Calibration(chip=chip, measured=Efficiencies(by_work=by_work))


@dataclass(frozen=True, kw_only=True)
class CalibrationSize:
    """Sizes of the arrays that are computed with, large enough to keep a device busy."""

    width: int = 5120
    mlp_dim: int = 13_824
    head_width: int = 128
    tokens: int = 32_768
    """Tokens of a layer, and of a row of two clips that attend to themselves."""
    dense_tokens: int = 4096
    """Tokens of a row whose scores are stored."""
    copy_bytes: int = 2**30
    """Bytes that are copied, and that all devices together gather."""
    repeats: int = 10
    """Number of measurements; the median counts."""


CPU_SIZE = CalibrationSize(
    width=512, mlp_dim=2048, head_width=64, tokens=2048, dense_tokens=1024, copy_bytes=2**26, repeats=5
)


def calibrate(
    devices: Sequence[Any] | None = None,
    *,
    size: CalibrationSize | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Measure one layer's products, attention, a copy in memory and a collective, and return their efficiencies.

    Attention is measured by each backend that the platform has. A machine's CPU is not in the table of chips: its peaks
    are the largest rates that are measured.

    Args:
      devices: Devices of one kind; all of this process by default. The collective is measured between all of them, the
        rest on the first.
      size: Sizes of the arrays; by default those for the platform.
      report: Called with a line about every measurement.

    Raises:
      UserError: If the devices are neither in the table of chips nor CPUs.
    """
    devices = jax.local_devices() if devices is None else devices
    device, chip = devices[0], find_chip(devices[0])
    if chip is None and device.platform != "cpu":
        rule = f"it must be a CPU or one of {', '.join(CHIPS)}"
        raise UserError(f"device {device.device_kind!r} is invalid: {rule}. Use one of these to calibrate")
    size = size or (CPU_SIZE if chip is None else CalibrationSize())
    source = f"measured on {device.device_kind}, {datetime.datetime.now(datetime.UTC).date()}, jax {jax.__version__}"
    with jax.default_device(device):
        rates = dict(_measure_rates(device.platform, size, report))
    if len(devices) > 1:
        rates[COLLECTIVES] = measure_gather(devices, size)
    if chip is None:
        chip = _make_cpu(rates, source)
    peaks = {MEMORY: chip.bandwidth, COLLECTIVES: chip.link_bandwidth}
    by_work = {}
    for work, rate in rates.items():
        share = rate * chip.device_count / peaks.get(work, chip.flops)
        by_work[work] = Efficiency(share=share, source=source)
        report(f"{work}: {rate / 1e9:,.4g} {'GB' if work in peaks else 'GFLOP'}/s, {share:.1%} of the peak")
    return Calibration(chip=chip, measured=Efficiencies(by_work=by_work))


_BACKENDS: dict[str, tuple[BackendName, ...]] = {
    "tpu": ("splash", "chunked", "dense"),
    "gpu": ("cudnn", "tokamax", "chunked", "dense"),
    "cpu": ("chunked", "dense"),
}


def _make_cpu(rates: Mapping[str, float], source: str) -> Chip:
    """Return this machine's CPU as a chip, whose peaks are the largest measured rates."""
    return Chip(
        name="cpu",
        kind="cpu",
        flops=max(rate for work, rate in rates.items() if work not in (MEMORY, COLLECTIVES)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=rates[MEMORY],
        link_bandwidth=rates.get(COLLECTIVES, rates[MEMORY]),
        source=f"{platform.processor() or platform.machine()}, {source}",
    )


def _measure_rates(
    platform_name: str, size: CalibrationSize, report: Callable[[str], None]
) -> Iterator[tuple[str, float]]:
    """Yield the kinds of work of one device and the operations, or bytes, per second of each."""
    yield PRODUCTS, measure_products(size)
    yield MEMORY, measure_copy(size)
    for backend in _BACKENDS[platform_name]:
        try:
            yield name_attention_work(backend), measure_attention(backend, size)
        except (UserError, NotImplementedError, ValueError, RuntimeError) as error:
            # It is not installed, or needs a newer GPU.
            report(f"{name_attention_work(backend)}: not measured: {str(error).splitlines()[0]}")


def _measure_seconds(function: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """Return the median seconds of a jitted function."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _get_dtype() -> Any:
    """Return the dtype of products: CPUs compute products of bfloat16 in float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _draw(*shape: int, dtype: Any, key: int = 0) -> Array:
    return jax.random.normal(jax.random.key(key), shape, dtype) * shape[-1] ** -0.5


def measure_products(size: CalibrationSize) -> float:
    """Return the FLOPs per second of the products with one layer's weights, forwards and backwards."""
    width, hidden, dtype = size.width, size.mlp_dim, _get_dtype()
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, hidden), "down": (hidden, width)}
    weights = {name: _draw(*shape, dtype=dtype) for name, shape in shapes.items()}

    def apply_layer(weights: dict[str, Array], x: Float[Array, "N D"]) -> Array:
        _, _, value = jnp.split(x @ weights["qkv"], 3, axis=-1)
        x = x + value @ weights["out"]
        x = x + jax.nn.gelu(x @ weights["up"]) @ weights["down"]
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    x = _draw(size.tokens, width, dtype=dtype)
    seconds = _measure_seconds(jax.jit(jax.grad(apply_layer, (0, 1))), weights, x, repeats=size.repeats)
    return 3 * 2 * size.tokens * sum(rows * columns for rows, columns in shapes.values()) / seconds


def measure_attention(backend: BackendName, size: CalibrationSize) -> float:
    """Return the FLOPs per second that a backend executes, as plans count them, forwards and backwards.

    Raises:
      UserError: If the backend is not available here.
    """
    tokens = size.dense_tokens if backend == "dense" else size.tokens
    attention, heads = make_attention(backend), size.width // size.head_width
    segments = jnp.asarray(np.repeat([1, 2], [tokens // 2, tokens - tokens // 2])[None], jnp.int32)
    inputs = AttentionInputs.self_attention(segments, segment_count=2)
    values = [_draw(1, tokens, heads, size.head_width, dtype=_get_dtype(), key=key) for key in range(4)]

    def attend(q: Array, k: Array, v: Array, d_out: Array) -> Any:
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, inputs), q, k, v)
        return out, back(d_out)

    seconds = _measure_seconds(jax.jit(attend), *values, repeats=size.repeats)
    pairs = (tokens // 2) ** 2 + (tokens - tokens // 2) ** 2
    costs = StepSpec(
        width=heads * size.head_width,
        mlp_dim=0,
        layers=1,
        tokens_per_row=tokens,
        rows=1,
        itemsize=values[0].dtype.itemsize,
        remat="none",
        forward_flops=0,
        attention_flops=4 * heads * size.head_width * pairs,
        attention=backend,
    )
    return costs.executed_attention_flops / seconds


def measure_copy(size: CalibrationSize) -> float:
    """Return the bytes per second that copies in the device's memory read and write."""
    x, copies = jnp.zeros(size.copy_bytes // 4, jnp.float32), 8

    @jax.jit
    def copy(x: Array) -> Array:
        # Several times, since a CPU's new pages take longer than what is written into them.
        return jax.lax.fori_loop(0, copies, lambda _, x: x + 1, x)

    return copies * 2 * x.nbytes / _measure_seconds(copy, x, repeats=size.repeats)


def measure_gather(devices: Sequence[Any], size: CalibrationSize) -> float:
    """Return the bytes per second that each device receives from the others when all gather an array."""
    mesh = Mesh(np.asarray(devices), ("data",))
    spec = PartitionSpec("data")
    x = jax.device_put(
        np.zeros(size.copy_bytes // 4 // len(devices) * len(devices), np.float32), jax.NamedSharding(mesh, spec)
    )

    def gather(x: Array) -> Array:
        return jax.lax.all_gather(x, "data", tiled=True)

    gathered = jax.jit(jax.shard_map(gather, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False))
    seconds = _measure_seconds(gathered, x, repeats=size.repeats)
    return x.nbytes * (len(devices) - 1) / len(devices) / seconds


_MAXTEXT = (
    "a language model's whole training: github.com/AI-Hypercomputer/maxtext, src/maxtext/configs/tpu/{}/README.md"
)
_TIERS = "Llama 3.1 70B's training: github.com/AI-Hypercomputer/maxtext, docs/reference/models/tiering.md"
_MAMF = "largest products: github.com/stas00/ml-engineering, compute/accelerator, maximum achievable matmul FLOPS"
_RING = "ring all-reduce of 8 GPUs: github.com/stas00/ml-engineering, network/README.md"
_WAN = "rest of Wan 14B's step after its products: github.com/AI-Hypercomputer/maxdiffusion, README.md, v5p-8"
_FLASH = "heads of 128, 8k and 16k tokens: FlashAttention-3, arXiv 2407.08608, figures 5 and 6"
_PUBLISHED: tuple[tuple[str, str, float, str], ...] = (
    # TPUs: model FLOPs of trainings without attention of note; what is recomputed and communicated lowers them.
    ("v4", PRODUCTS, 0.567, _MAXTEXT.format("v4")),
    ("v5e", PRODUCTS, 0.669, _MAXTEXT.format("v5e")),
    ("v5p", PRODUCTS, 0.715, _MAXTEXT.format("v5p")),
    ("v6e", PRODUCTS, 0.503, _TIERS),
    # 36.008 s on four chips of 459 TFLOP/s, all recomputed. Products: 4/3 of 5,432 TFLOP, at the share above 5.5 s. The
    # other 30.5 s are attention: 5.5/3 of 14,141 TFLOP, two forward passes and a backward pass of 3.5 instead of 3.
    ("v5p", name_attention_work("splash"), 0.463, _WAN),
    ("a100", PRODUCTS, 0.869, _MAMF),
    ("h100", PRODUCTS, 0.803, _MAMF),
    ("h200", PRODUCTS, 0.803, _MAMF),
    ("b200", PRODUCTS, 0.776, _MAMF),
    # Forward 595 and backward 516 of 989 TFLOP/s, with 2 and 5 of 7 products. Without a kernel 139 and 181, with 2 and
    # 4 of 6 products, although the source counts 5 in the backward pass, too.
    ("h100", name_attention_work("cudnn"), 0.542, _FLASH),
    ("h200", name_attention_work("cudnn"), 0.542, f"H100: {_FLASH}"),
    ("h100", name_attention_work("dense"), 0.144, _FLASH),
    ("h200", name_attention_work("dense"), 0.144, f"H100: {_FLASH}"),
    ("a100", COLLECTIVES, 0.78, _RING),
    ("h100", COLLECTIVES, 0.82, f"H200, with the same NVLink: {_RING}"),
    ("h200", COLLECTIVES, 0.82, _RING),
    ("b200", COLLECTIVES, 0.76, _RING),
)
PUBLISHED_EFFICIENCIES = {
    name: Efficiencies(
        by_work={
            work: Efficiency(share=share, source=source) for chip, work, share, source in _PUBLISHED if chip == name
        }
    )
    for name in CHIPS
}
"""Efficiencies of each chip of the table that were published."""
