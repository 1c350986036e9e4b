"""How fast training is on this machine: one JSON document on stdout, progress on stderr.

    python tools/benchmark.py                                    # all parts, with the quickstart's models
    python tools/benchmark.py denoiser autoencoder               # some parts
    python tools/benchmark.py --config experiments/configs/clips.py --steps 50
    python tools/benchmark.py denoiser --set dit.width=1024 --set dit.heads=16 --set dit.dtype=bfloat16

`denoiser` and `autoencoder` time training steps on random latents and pixels of mixed sizes, packed as in training.
`data` reads an epoch of cached latents through the real loader. A part whose packages are missing is skipped, and the
document says so: `denoiser` and `autoencoder` need JAX, Flax and optax alone (with `--config`, what that file imports).
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import dit_video
from dit_video import rng
from dit_video.autoencoder import PatchVaeConfig, clip_grid, latent_grid
from dit_video.data.plan import RowStream
from dit_video.diffusion import FlowMatching, LogitNormal
from dit_video.distributed import MeshConfig, make_mesh, shard_batch, shardings
from dit_video.dit import DitConfig
from dit_video.errors import MissingError, UserError, script
from dit_video.nn import graph_of, init_params
from dit_video.text import ByteEncoderConfig
from dit_video.tokens import Grid, Item, Rows, RowShape, coordinates, pack, patchify, token_grid
from dit_video.training.autoencoder import AutoencoderLoss
from dit_video.training.denoiser import DenoiserLoss
from dit_video.training.optimizer import OptimizerConfig, make_optimizer
from dit_video.training.state import TrainState, new_state
from dit_video.training.step import Loss, Step, make_step
from dit_video.tree import size as count

PARTS = ("denoiser", "autoencoder", "data")
_COMPILED = "/jax/core/compile/backend_compile_duration"
_WORDS = (("red", "green", "blue", "magenta"), ("circle", "square", "triangle"), ("", " moving up", " moving right"))
_HORIZON = 100_000
"""Steps that learning rates are planned for; a schedule costs the same for any number."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured: the parts of an experiment that decide the speed."""

    name: str = "quickstart"
    dit: DitConfig = DitConfig(channels=8, context_width=64, patch=Grid(1, 2, 2), width=160, layers=5, heads=4)  # noqa: RUF009
    text: ByteEncoderConfig = ByteEncoderConfig(width=64, layers=1, max_tokens=64)  # noqa: RUF009
    rows: RowShape = RowShape(tokens=120, text=192, segments=12)  # noqa: RUF009
    batch: int = 8
    optimizer: OptimizerConfig = OptimizerConfig(  # noqa: RUF009
        kind="muon", learning_rate=2e-3, schedule="wsd", warmup=50, b2=0.99
    )
    objective: FlowMatching = FlowMatching(times=LogitNormal())  # noqa: RUF009
    autoencoder: PatchVaeConfig = PatchVaeConfig(stride=Grid(4, 8, 8), channels=8, width=64, blocks=3)  # noqa: RUF009
    autoencoder_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup=30)  # noqa: RUF009
    window: Grid = Grid(17, 32, 32)
    windows: int = 16
    """of an autoencoder's step"""
    max_pixels: int = 32 * 48
    max_frames: int = 17
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009


class Example(NamedTuple):
    """A clip as the denoiser's training sees it, but for its values."""

    latents: Grid
    caption: str


def setting_of(experiment: Any) -> Setting:
    """The setting of an `Experiment`, with the first of its window shapes."""
    autoencoder, denoiser = experiment.autoencoder, experiment.denoiser
    return Setting(
        name=experiment.name,
        dit=denoiser.dit,
        text=denoiser.text,
        rows=denoiser.rows,
        batch=denoiser.batch,
        optimizer=denoiser.optimizer,
        objective=denoiser.objective,
        autoencoder=autoencoder.model,
        autoencoder_optimizer=autoencoder.optimizer,
        window=autoencoder.windows[0].size,
        windows=autoencoder.windows[0].batch,
        max_pixels=experiment.data.max_pixels,
        max_frames=experiment.data.max_frames,
        mesh=experiment.mesh,
    )


def read_setting(path: Path) -> Setting:
    """The setting of a config file's `EXPERIMENT`.

    Raises:
      MissingError: no such file.
      UserError: a file without an experiment, or one that imports what is not installed.
    """
    specification = importlib.util.spec_from_file_location("experiment_config", path) if path.is_file() else None
    if specification is None or specification.loader is None:
        raise MissingError(f"no such config: {path}; name a file such as experiments/configs/clips.py")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs {error.name}, which is not installed; leave out --config") from error
    if not hasattr(module, "EXPERIMENT"):
        raise UserError(f"{path} defines no EXPERIMENT; assign it an Experiment(...)")
    return setting_of(module.EXPERIMENT)


def changed(value: Any, path: str, new: Any) -> Any:
    """A nested dataclass with one field changed: `changed(setting, "dit.width", 1024)`.

    Raises:
      UserError: no such field.
    """
    name, _, rest = path.partition(".")
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    if name not in fields:
        raise UserError(f"there is no {name!r} to set; use one of {', '.join(fields)}")
    old = getattr(value, name)
    if not rest and isinstance(old, Grid):
        new = Grid(*new)
    changes = {name: changed(old, rest, new) if rest else new}
    if isinstance(value, DitConfig) and name in ("width", "heads"):
        changes["rotary"] = None  # follows the head width
    return dataclasses.replace(value, **changes)


# What steps are given.


def clip_sizes(setting: Setting) -> list[Grid]:
    """Nine sizes within the limits: an image, half the length and all of it, each square, wide and high."""
    stride, patch = setting.autoencoder.stride, setting.dit.patch
    step_h, step_w = stride.h * patch.h, stride.w * patch.w
    longest = (setting.max_frames - 1) // stride.t
    sizes = []
    for chunks, ratio in itertools.product((0, (longest + 1) // 2, longest), (1.0, 1.5, 1 / 1.5)):
        height = max(1, math.floor(math.sqrt(setting.max_pixels / ratio) / step_h)) * step_h
        most = max(1, setting.max_pixels // height // step_w)
        width = min(most, max(1, round(height * ratio / step_w))) * step_w
        sizes.append(Grid(1 + chunks * stride.t, height, width))
    return sizes


def make_examples(setting: Setting, number: int) -> list[Example]:
    """Examples of mixed sizes and captions."""
    generator = rng.host(0, "benchmark")
    grids = [latent_grid(size, setting.autoencoder.stride) for size in clip_sizes(setting)]
    captions = ["a {} {}{}".format(*words) for words in itertools.product(*_WORDS)]
    return [
        Example(grids[int(generator.integers(len(grids)))], captions[int(generator.integers(len(captions)))])
        for _ in range(number)
    ]


def values_of(setting: Setting, index: int, example: Example) -> np.ndarray:
    """An example's latents."""
    shape = (*example.latents, setting.dit.channels)
    return rng.host(0, "benchmark latents", index).standard_normal(shape, np.float32)


def byte_tokens(setting: Setting, caption: str) -> np.ndarray:
    """As the tokenizer of `setting.text` does it, without `transformers`."""
    tokens = [byte + 3 for byte in caption.encode()][: setting.text.max_tokens - 1] + [1]
    return np.asarray(tokens + [0] * (-len(tokens) % setting.text.patch), np.int32)


class Packed:
    """Batches of rows of an epoch, made from examples in memory."""

    def __init__(self, setting: Setting, number: int):
        self._setting, self._examples = setting, make_examples(setting, number)
        grids = [token_grid(example.latents, setting.dit.patch) for example in self._examples]
        text = [len(byte_tokens(setting, example.caption)) for example in self._examples]
        self._stream = RowStream(np.asarray([grid.volume for grid in grids]), np.asarray(text), setting.rows, seed=0)
        self.padding = self._stream.epoch(0).padding
        self.sizes = len({example.latents for example in self._examples})

    def __iter__(self) -> Iterator[Rows]:
        """Endless."""
        rows = (self._row(number) for number in itertools.count())
        while True:
            yield Rows(*map(np.stack, zip(*itertools.islice(rows, self._setting.batch), strict=True)))

    def _row(self, number: int) -> Rows:
        patch, width = self._setting.dit.patch, self._setting.dit.token_width
        items = []
        for index, rank in zip(*self._stream.row(number), strict=True):
            example = self._examples[index]
            tokens = patchify(values_of(self._setting, int(index), example), patch)
            grid = token_grid(example.latents, patch)
            items.append(Item(tokens, coordinates(grid), byte_tokens(self._setting, example.caption), rank))
        return pack(items, self._setting.rows, width=width)


# What is measured.


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """How many programs XLA has compiled since the beginning of the block."""
    number = itertools.count()
    compiled = 0

    def listen(event: str, _seconds: float, **_: Any) -> None:
        nonlocal compiled
        if event == _COMPILED:
            compiled = next(number) + 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Trained(NamedTuple):
    """A step that was compiled, the state after it, and how to lay out a batch."""

    step: Step
    state: TrainState
    place: Callable[[Any], Any]


def trainable(setting: Setting, init: Callable, loss: Loss, optimizer: OptimizerConfig) -> Trained:
    """A model on the mesh, before its first step."""
    mesh = make_mesh(setting.mesh)
    made = make_optimizer(optimizer, steps=_HORIZON + optimizer.warmup)
    layout = functools.partial(shardings, mesh=mesh)
    state = new_state(init, made, rng.key(0, "benchmark"), shardings=layout)
    jax.block_until_ready(state)
    return Trained(make_step(loss, made, ema_decay=0.999), state, functools.partial(shard_batch, mesh=mesh))


def time_steps(trained: Trained, batches: Sequence[Any], steps: int) -> tuple[dict[str, Any], Trained]:
    """Compile, warm up, and time `steps` steps on batches that lie on the device already."""
    placed = [trained.place(batch) for batch in batches]
    jax.block_until_ready(placed)
    state = trained.state
    with compilations() as compiled:
        began = time.perf_counter()
        state, metrics = trained.step(state, placed[0])
        jax.block_until_ready(metrics)
        first = time.perf_counter() - began
        for batch in placed[1:3]:
            state, metrics = trained.step(state, batch)
        jax.block_until_ready(metrics)
        began = time.perf_counter()
        for number in range(steps):
            state, metrics = trained.step(state, placed[number % len(placed)])
        jax.block_until_ready((state, metrics))
        seconds = (time.perf_counter() - began) / steps
        total = compiled()
    figures = {
        "step_ms": round(1000 * seconds, 3),
        "first_step_seconds": round(first, 2),
        "steps": steps,
        "compilations": total,
        "loss": float(metrics["loss"]),
        "parameters": count(state.params),
    }
    return figures, trained._replace(state=state)


def measure_denoiser(setting: Setting, steps: int, number: int) -> tuple[dict[str, Any], Trained]:
    """The packed training step of the denoiser with its text encoder."""
    loss = DenoiserLoss(
        dit=graph_of(setting.dit.make),
        text=graph_of(setting.text.make),
        objective=setting.objective,
        caption_dropout=0.1,
        empty_caption=tuple(byte_tokens(setting, "").tolist()),
        seed=0,
    )

    def init(key):
        first, second = jax.random.split(key)
        return {"dit": init_params(setting.dit.make, first), "text": init_params(setting.text.make, second)}

    packed = Packed(setting, number)
    batches = list(itertools.islice(packed, 8))
    trained = trainable(setting, init, loss, setting.optimizer)
    figures, trained = time_steps(trained, batches, steps)
    tokens = setting.batch * setting.rows.tokens
    real = float(np.mean([(batch.segments > 0).sum(axis=(0, 1)) for batch in batches]))
    figures |= {
        "tokens_per_step": tokens,
        "tokens_per_second": round(1000 * tokens / figures["step_ms"]),
        "clip_tokens_per_second": round(1000 * real / figures["step_ms"]),
        "sizes": packed.sizes,
        "padding_share": round(packed.padding, 4),
        "peak_memory": peak_memory(),
    }
    return figures, trained


def measure_autoencoder(setting: Setting, steps: int) -> dict[str, Any]:
    """The autoencoder's training step on windows of pixels."""
    model = setting.autoencoder
    loss = AutoencoderLoss(graph=graph_of(model.make), kl=1e-4, seed=0)
    trained = trainable(setting, functools.partial(init_params, model.make), loss, setting.autoencoder_optimizer)
    shape = (setting.windows, *setting.window, 3)
    generator = rng.host(0, "benchmark windows")
    batches = [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(2)]
    figures, _ = time_steps(trained, batches, steps)
    latents = latent_grid(setting.window, model.stride)
    return figures | {
        "windows": f"{setting.windows} of {'x'.join(map(str, clip_grid(latents, model.stride)))}",
        "tokens_per_second": round(1000 * setting.windows * latents.volume / figures["step_ms"]),
        "pixels_per_second": round(1000 * setting.windows * setting.window.volume / figures["step_ms"]),
        "peak_memory": peak_memory(),
    }


def measure_data(setting: Setting, trained: Trained, number: int) -> dict[str, Any]:
    """An epoch of cached latents through the real loader and the real loop, with a denoiser's compiled step.

    Raises:
      ModuleNotFoundError: a package that the loader or the loop need.
    """
    from dit_video.data.latents import LatentExample, LatentSource, write_latents
    from dit_video.data.loader import packed_batches
    from dit_video.training import loop
    from dit_video.training.logging import MetricsLog, read

    examples = make_examples(setting, number)
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder, compilations() as compiled:
        write_latents(
            Path(folder) / "latents",
            (LatentExample(str(n), one.caption, values_of(setting, n, one)) for n, one in enumerate(examples)),
            identity="benchmark",
        )
        source = LatentSource(Path(folder) / "latents")
        batches = packed_batches(
            source,
            setting.text.tokenizer(),
            patch=setting.dit.patch,
            shape=setting.rows,
            batch=setting.batch,
            seed=0,
        )
        done = int(trained.state.step)
        epoch = -(-batches.rows_per_epoch // setting.batch)
        seen: list[int] = []
        log = MetricsLog(Path(folder) / "metrics.jsonl")
        with contextlib.closing(batches):
            loop.run(
                trained.step,
                trained.state,
                lambda _: map(trained.place, batches),
                # Two entries, as the first one leaves its first step out.
                config=loop.LoopConfig(steps=done + epoch, log_every=done + epoch, save_every=done + epoch + 1),
                log=log,
                title="an epoch",
                on_step=lambda _done, _state: seen.append(compiled()),
            )
        entry = read(log.path)[-1]
    return {
        "examples": number,
        "steps": epoch,
        "step_ms": round(1000 * entry["step_seconds"], 3),
        "waiting_share": round(entry["data_wait"], 4),
        "padding_share": round(batches.padding, 4),
        "compilations": seen[-1],
        "peak_memory": peak_memory(),
    }


def peak_memory() -> dict[str, Any]:
    """Bytes at the most until now: of the first device where it says so, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return {"of": "device", "bytes": int(statistics["peak_bytes_in_use"])}
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return {"of": "unknown", "bytes": None}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"of": "process", "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "dit_video": dit_video.__version__,
    }


def benchmark(setting: Setting, parts: Sequence[str], *, steps: int, examples: int) -> dict[str, Any]:
    """The whole document."""
    document: dict[str, Any] = {"machine": machine(), "setting": setting.name}
    if "denoiser" in parts or "data" in parts:
        print("denoiser", file=sys.stderr)
        document["denoiser"], trained = measure_denoiser(setting, steps, examples)
        if "data" in parts:
            print("data", file=sys.stderr)
            try:
                document["data"] = measure_data(setting, trained, examples)
            except ModuleNotFoundError as error:
                document["data"] = {"skipped": f"{error.name} is not installed"}
            else:
                # The packed step must be compiled once for all sizes and for both sources of batches.
                total = document["denoiser"]["compilations"] + document["data"]["compilations"]
                document["packed_step_compilations"] = total
    if "autoencoder" in parts:
        print("autoencoder", file=sys.stderr)
        document["autoencoder"] = measure_autoencoder(setting, steps)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--config", type=Path, help="a config file, instead of the quickstart's models")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each model")
    parser.add_argument("--examples", type=int, default=400, help="clips of the data set")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the setting")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        raise UserError(f"there is no part {unknown[0]!r}; use {', '.join(PARTS)}")
    if arguments.steps < 1 or arguments.examples < 1:
        raise UserError(f"--steps {arguments.steps} and --examples {arguments.examples} must be at least 1")
    setting = Setting() if arguments.config is None else read_setting(arguments.config)
    for assignment in arguments.set:
        name, _, text = assignment.partition("=")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        setting = changed(setting, name, value)
    document = benchmark(setting, arguments.parts or PARTS, steps=arguments.steps, examples=arguments.examples)
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    script(main)()
