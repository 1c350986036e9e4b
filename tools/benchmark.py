"""How fast training is on this machine: one JSON document on stdout, progress on stderr.

    python tools/benchmark.py                                    # all parts, with the quickstart's models
    python tools/benchmark.py denoiser autoencoder               # some parts
    python tools/benchmark.py --config experiments/configs/clips.py --steps 50
    python tools/benchmark.py denoiser --set denoiser.dit.width=1024 --set denoiser.dit.heads=16

`denoiser` and `autoencoder` time training steps on random latents and pixels of mixed sizes, packed as in training.
`data` reads an epoch of cached latents through the real loader. A part whose packages are missing is skipped, and the
document says so: `denoiser` and `autoencoder` need JAX, Flax and optax alone. Where the quickstart's config cannot be
imported for that reason, models of about its size are measured, and `setting` is `built in`.
"""

import argparse
import ast
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

import dit_video
from dit_video import rng
from dit_video.autoencoder import PatchVaeConfig, latent_grid
from dit_video.data.plan import RowStream
from dit_video.diffusion import FlowMatching, LogitNormal, RectifiedFlow
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


CONFIG = Path(__file__).resolve().parents[1] / "experiments" / "configs" / "quickstart.py"
# What is measured where the config's imports are not installed: about its models.
BUILT_IN = SimpleNamespace(
    name="built in",
    data=SimpleNamespace(max_pixels=32 * 48, max_frames=17),
    autoencoder=SimpleNamespace(
        model=PatchVaeConfig(stride=Grid(4, 8, 8), channels=8, width=64, blocks=3),
        windows=(SimpleNamespace(size=Grid(17, 32, 32), batch=16),),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup=30),
    ),
    denoiser=SimpleNamespace(
        dit=DitConfig(channels=8, context_width=64, patch=Grid(1, 2, 2), width=160, layers=5, heads=4),
        text=ByteEncoderConfig(width=64, layers=1, max_tokens=64),
        rows=RowShape(tokens=120, text=192, segments=12),
        batch=8,
        optimizer=OptimizerConfig(kind="muon", learning_rate=2e-3, schedule="wsd", warmup=50, b2=0.99),
        objective=FlowMatching(process=RectifiedFlow(), times=LogitNormal()),
    ),
    mesh=MeshConfig(),
)
Setting = Any
"""`BUILT_IN`, or an `Experiment`."""


def default_setting() -> Setting:
    """The quickstart's experiment, or `BUILT_IN`."""
    try:
        return runpy.run_path(str(CONFIG))["EXPERIMENT"]
    except ModuleNotFoundError:
        return BUILT_IN


def read_setting(path: Path) -> Setting:
    """The `EXPERIMENT` of a config file.

    Raises:
      MissingError: no such file.
      UserError: a file without an experiment, or one that imports what is not installed.
    """
    if not path.is_file():
        raise MissingError(f"no such config: {path}; name a file such as experiments/configs/clips.py")
    try:
        experiment = runpy.run_path(str(path)).get("EXPERIMENT")
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs {error.name}, which is not installed; leave out --config") from error
    if experiment is None:
        raise UserError(f"{path} defines no EXPERIMENT; assign it an Experiment(...)")
    return experiment


def changed(value: Any, path: str, new: Any) -> Any:
    """A nested config with one field changed: `changed(setting, "denoiser.dit.width", 1024)`.

    Raises:
      UserError: no such field.
    """
    name, _, rest = path.partition(".")
    fields = {one: getattr(value, one) for one in getattr(value, "__dict__", {})}
    if name not in fields:
        raise UserError(f"there is no {name!r} to set; use one of {', '.join(fields)}")
    old = fields[name]
    new = changed(old, rest, new) if rest else Grid(*new) if isinstance(old, Grid) else new
    follows = {"rotary": None} if isinstance(value, DitConfig) and name in ("width", "heads") else {}
    return type(value)(**fields | {name: new} | follows)


# What steps are given.


class Example(NamedTuple):
    """A clip as the denoiser's training sees it, but for its values."""

    latents: Grid
    caption: str


def clip_sizes(setting: Setting) -> list[Grid]:
    """Sizes within the limits: an image, half the length and all of it, each square, wide and high."""
    stride, patch = setting.autoencoder.model.stride, setting.denoiser.dit.patch
    step_h, step_w = stride.h * patch.h, stride.w * patch.w
    longest = (setting.data.max_frames - 1) // stride.t
    sizes = []
    for chunks, ratio in itertools.product((0, (longest + 1) // 2, longest), (1.0, 1.5, 1 / 1.5)):
        height = max(1, math.floor(math.sqrt(setting.data.max_pixels / ratio) / step_h)) * step_h
        most = max(1, setting.data.max_pixels // height // step_w)
        width = min(most, max(1, round(height * ratio / step_w))) * step_w
        sizes.append(Grid(1 + chunks * stride.t, height, width))
    return sizes


def make_examples(setting: Setting, number: int) -> list[Example]:
    """Examples of mixed sizes and captions."""
    generator = rng.host(0, "benchmark")
    grids = [latent_grid(size, setting.autoencoder.model.stride) for size in clip_sizes(setting)]
    captions = ["a {} {}{}".format(*words) for words in itertools.product(*_WORDS)]
    drawn = ((int(generator.integers(len(grids))), int(generator.integers(len(captions)))) for _ in range(number))
    return [Example(grids[grid], captions[caption]) for grid, caption in drawn]


def values_of(setting: Setting, index: int, example: Example) -> np.ndarray:
    """An example's latents."""
    shape = (*example.latents, setting.denoiser.dit.channels)
    return rng.host(0, "benchmark latents", index).standard_normal(shape, np.float32)


def byte_tokens(setting: Setting, caption: str) -> np.ndarray:
    """As the text encoder's tokenizer does it, without `transformers`."""
    config = setting.denoiser.text
    tokens = [*(byte + 3 for byte in caption.encode()[: config.max_tokens - 1]), 1]
    return np.asarray(tokens + [0] * (-len(tokens) % config.patch), np.int32)


class Packed:
    """Batches of rows from examples in memory, endless."""

    def __init__(self, setting: Setting, number: int):
        self._setting, self._examples = setting, make_examples(setting, number)
        self._config = config = setting.denoiser
        grids = [token_grid(example.latents, config.dit.patch) for example in self._examples]
        text = [len(byte_tokens(setting, example.caption)) for example in self._examples]
        self._stream = RowStream(np.asarray([grid.volume for grid in grids]), np.asarray(text), config.rows, seed=0)
        self.padding = self._stream.epoch(0).padding
        self.sizes = len({example.latents for example in self._examples})

    def __iter__(self) -> Iterator[Rows]:
        rows = (self._row(number) for number in itertools.count())
        while True:
            yield Rows(*map(np.stack, zip(*itertools.islice(rows, self._config.batch), strict=True)))

    def _row(self, number: int) -> Rows:
        patch = self._config.dit.patch
        items = []
        for index, rank in zip(*self._stream.row(number), strict=True):
            example = self._examples[index]
            tokens = patchify(values_of(self._setting, int(index), example), patch)
            at = coordinates(token_grid(example.latents, patch))
            items.append(Item(tokens, at, byte_tokens(self._setting, example.caption), rank))
        return pack(items, self._config.rows, width=self._config.dit.token_width)


# What is measured.


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """How many programs XLA has compiled since the block was entered."""
    compiled = 0

    def listen(event: str, _seconds: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event == _COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Trained(NamedTuple):
    """A step, the state after the last one, and how to lay out a batch."""

    step: Step
    state: TrainState
    place: Callable[[Any], Any]


def trainable(setting: Setting, init: Callable, loss: Loss, config: OptimizerConfig) -> Trained:
    """A model on the mesh, before its first step."""
    mesh = make_mesh(setting.mesh)
    optimizer = make_optimizer(config, steps=_HORIZON + config.warmup)
    layout = functools.partial(shardings, mesh=mesh)
    state = new_state(init, optimizer, rng.key(0, "benchmark"), shardings=layout)
    jax.block_until_ready(state)
    return Trained(make_step(loss, optimizer, ema_decay=0.999), state, functools.partial(shard_batch, mesh=mesh))


def time_steps(trained: Trained, batches: Sequence[Any], steps: int) -> tuple[dict[str, Any], Trained]:
    """Compile, warm up, and time `steps` steps on batches that lie on the device already."""
    step, state = trained.step, trained.state
    placed = [trained.place(batch) for batch in batches]
    jax.block_until_ready(placed)
    with compilations() as compiled:
        began = time.perf_counter()
        state, metrics = step(state, placed[0])
        jax.block_until_ready(metrics)
        first = time.perf_counter() - began
        for batch in placed[1:3]:
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        began = time.perf_counter()
        for number in range(steps):
            state, metrics = step(state, placed[number % len(placed)])
        jax.block_until_ready((state, metrics))
        seconds = (time.perf_counter() - began) / steps
        total = compiled()
    figures = {
        "parameters": count(state.params),
        "step_ms": round(1000 * seconds, 3),
        "steps": steps,
        "first_step_seconds": round(first, 2),
        "compilations": total,
        "loss": float(metrics["loss"]),
    }
    return figures, trained._replace(state=state)


def measure_denoiser(setting: Setting, steps: int, number: int) -> tuple[dict[str, Any], Trained]:
    """The packed training step of the denoiser with its text encoder."""
    config = setting.denoiser
    loss = DenoiserLoss(
        dit=graph_of(config.dit.make),
        text=graph_of(config.text.make),
        objective=config.objective,
        caption_dropout=0.1,
        empty_caption=tuple(byte_tokens(setting, "").tolist()),
        seed=0,
    )

    def init(key):
        first, second = jax.random.split(key)
        return {"dit": init_params(config.dit.make, first), "text": init_params(config.text.make, second)}

    packed = Packed(setting, number)
    batches = list(itertools.islice(packed, 8))
    figures, trained = time_steps(trainable(setting, init, loss, config.optimizer), batches, steps)
    tokens = config.batch * config.rows.tokens
    real = float(np.mean([(batch.segments > 0).sum(axis=(0, 1)) for batch in batches]))
    figures |= {
        "tokens_per_step": tokens,
        "tokens_per_second": round(1000 * tokens / figures["step_ms"]),
        "tokens_per_second_without_padding": round(1000 * real / figures["step_ms"]),
        "sizes": packed.sizes,
        "padding_share": round(packed.padding, 4),
        "peak_memory": peak_memory(),
    }
    return figures, trained


def measure_autoencoder(setting: Setting, steps: int) -> dict[str, Any]:
    """The autoencoder's training step on windows of pixels; its tokens are latent positions."""
    config, model, window = setting.autoencoder, setting.autoencoder.model, setting.autoencoder.windows[0]
    loss = AutoencoderLoss(graph=graph_of(model.make), kl=1e-4, seed=0)
    trained = trainable(setting, functools.partial(init_params, model.make), loss, config.optimizer)
    generator = rng.host(0, "benchmark windows")
    batches = [generator.integers(0, 256, (window.batch, *window.size, 3), dtype=np.uint8) for _ in range(2)]
    figures, _ = time_steps(trained, batches, steps)
    latents = latent_grid(window.size, model.stride)
    return figures | {
        "windows": f"{window.batch} of {'x'.join(map(str, window.size))}",
        "tokens_per_second": round(1000 * window.batch * latents.volume / figures["step_ms"]),
        "pixels_per_second": round(1000 * window.batch * window.size.volume / figures["step_ms"]),
        "peak_memory": peak_memory(),
    }


def measure_data(setting: Setting, trained: Trained, number: int) -> dict[str, Any]:
    """An epoch of cached latents through the real loader and the real loop, with a denoiser's compiled step.

    Raises:
      ModuleNotFoundError: a package that the loader or the loop needs.
    """
    from dit_video.data.latents import LatentExample, LatentSource, write_latents
    from dit_video.data.loader import Reading, packed_batches
    from dit_video.training import loop
    from dit_video.training.logging import MetricsLog, read

    config, examples = setting.denoiser, enumerate(make_examples(setting, number))
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder, compilations() as compiled:
        encoded = (LatentExample(str(index), one.caption, values_of(setting, index, one)) for index, one in examples)
        write_latents(Path(folder) / "latents", encoded, identity="benchmark")
        source, tokenizer = LatentSource(Path(folder) / "latents"), config.text.tokenizer()
        reading = Reading(batch=config.batch, seed=0)
        batches = packed_batches(source, tokenizer, patch=config.dit.patch, shape=config.rows, reading=reading)
        epoch = -(-batches.rows_per_epoch // config.batch)
        last = int(trained.state.step) + epoch
        log = MetricsLog(Path(folder) / "metrics.jsonl")
        total: list[int] = []
        with contextlib.closing(batches):
            loop.run(
                trained.step,
                trained.state,
                lambda _: map(trained.place, batches),
                config=loop.LoopConfig(steps=last, log_every=last, save_every=last),
                log=log,
                title="an epoch",
                on_step=lambda _done, _state: total.append(compiled()),
            )
        entry = read(log.path)[-1]
    return {
        "examples": number,
        "steps": epoch,
        "step_ms": round(1000 * entry["step_seconds"], 3),
        "waiting_share": round(entry["data_wait"], 4),
        "padding_share": round(batches.padding, 4),
        "compilations": total[-1],
        "peak_memory": peak_memory(),
    }


def peak_memory() -> dict[str, Any]:
    """Bytes at the most until now: of the first device where it says so, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return {"of": "device", "bytes": int(statistics["peak_bytes_in_use"])}
    import resource  # Linux and macOS

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
        print("the denoiser's step", file=sys.stderr)
        document["denoiser"], trained = measure_denoiser(setting, steps, examples)
    if "data" in parts:
        print("an epoch of the loader", file=sys.stderr)
        try:
            document["data"] = measure_data(setting, trained, examples)
        except ModuleNotFoundError as error:
            document["data"] = {"skipped": f"{error.name} is not installed"}
        else:
            # One for all sizes, prompts and steps, whichever way the rows come.
            both = document["denoiser"]["compilations"] + document["data"]["compilations"]
            document["packed_step_compilations"] = both
    if "autoencoder" in parts:
        print("the autoencoder's step", file=sys.stderr)
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
    setting = default_setting() if arguments.config is None else read_setting(arguments.config)
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
