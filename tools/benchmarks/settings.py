"""The models and the synthetic examples of the benchmarks."""

import ast
import functools
import itertools
import math
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.core.shared_array import SharedStrings
from dit_video.data.captions import TokenizedCaptions
from dit_video.data.examples import ExampleTable
from dit_video.data.packing.plan import RowPlanner
from dit_video.diffusion import RectifiedFlow
from dit_video.distributed import Parallelism
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig, latent_grid
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.models.model_config import ModelConfig
from dit_video.tokens import (
    Grid,
    PackedBatch,
    PackedExample,
    PackedShape,
    compute_positions,
    compute_token_grid,
    pack,
    patchify,
    stack_rows,
)
from dit_video.training.optim.optimizer import AdamW, Muon
from dit_video.training.optim.schedules import Cosine, WarmupStableDecay

_WORDS = (
    ("red", "green", "blue", "yellow", "magenta", "white"),
    ("circle", "square", "triangle"),
    (" moving left", " moving right", " moving up", " moving down"),
)
DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "experiments" / "configs" / "quickstart.py"
# Models of about the same size, for when the imports of the quickstart's config are not installed.
BUILT_IN = SimpleNamespace(
    name="built in",
    data=SimpleNamespace(max_pixels=32 * 48, max_frames=17),
    model=ModelConfig(
        autoencoder=PatchVaeConfig(stride=Grid(4, 8, 8), channels=8, width=72, blocks=2),
        backbone=DiTConfig(channels=8, context_width=64, patch=Grid(1, 2, 2), width=176, layers=4, heads=4),
        text_encoder=ByteEncoderConfig(width=64, layers=1, max_tokens=64),
        process=RectifiedFlow(shift=5.0),
        layout=PackedShape(tokens=120, text=224, segments=12),
    ),
    autoencoder=SimpleNamespace(
        windows=(SimpleNamespace(size=Grid(17, 32, 32), batch=16),),
        optimizer=AdamW(learning_rate=3e-3, schedule=Cosine(warmup=30)),
        loss=AutoencoderObjective.pixels(kl=1e-4),
    ),
    denoiser=SimpleNamespace(
        batch=8,
        optimizer=Muon(learning_rate=3e-3, schedule=WarmupStableDecay(warmup=50), rms=0.5, b2=0.99),
    ),
    parallel=Parallelism(),
)
Setting = Any
"""An `Experiment`, or `BUILT_IN`, which has the fields that the benchmarks use."""


def load_default_setting() -> Setting:
    """Load the quickstart's experiment, or return `BUILT_IN` if its imports are not installed."""
    try:
        return runpy.run_path(str(DEFAULT_CONFIG))["EXPERIMENT"]
    except ModuleNotFoundError:
        return BUILT_IN


def read_setting(path: Path) -> Setting:
    """Read the `EXPERIMENT` of a config file.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file defines no experiment, or imports a package that is not installed.
    """
    try:
        from dit_video.experiment.config_file import load_experiment

        return load_experiment(path)
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs {error.name}, which is not installed; install it, or drop --config") from error


def resolve_setting(config: Path | None, changes: Sequence[str]) -> Setting:
    """Read a setting from a config file, or the default one, and apply changes of the form `NAME=VALUE`.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file defines no experiment or imports a package that is not installed, or if a field does not
        exist.
    """
    return change_setting(load_default_setting() if config is None else read_setting(config), changes)


def change_setting(setting: Setting, changes: Sequence[str]) -> Setting:
    """Return a setting with changes of the form `NAME=VALUE`, which are made together.

    Raises:
      UserError: If a field does not exist or rejects its value.
    """
    values = {}
    for assignment in changes:
        name, _, text = assignment.partition("=")
        try:
            values[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            values[name] = text
    return replace_fields(setting, values)


def replace_fields(config: Any, changes: Mapping[str, Any]) -> Any:
    """Return a nested config with fields replaced together: `replace_fields(setting, {"model.backbone.width": 1024})`.

    A stage of an experiment is a field of its name: `replace_fields(experiment, {"denoiser.batch": 16})`.

    Raises:
      UserError: If a field does not exist.
    """
    groups: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        groups.setdefault(name, {})[rest] = value
    fields = {field: getattr(config, field) for field in getattr(config, "__dict__", {})}
    stages = {stage.name: stage for stage in fields.get("stages", ())}
    for name, inner in groups.items():
        owner = stages if name in stages and "" not in inner else fields
        if name not in owner:
            raise UserError(f"field {name!r} does not exist; use one of {', '.join((*fields, *stages))}")
        if "" not in inner:
            owner[name] = replace_fields(owner[name], inner)
        else:
            owner[name] = Grid(*inner[""]) if isinstance(owner[name], Grid) else inner[""]
    return type(config)(**fields | ({"stages": tuple(stages.values())} if stages else {}))


class SyntheticExample(NamedTuple):
    """A synthetic training example of the denoiser: a latent grid and a caption."""

    latents: Grid
    caption: str


def make_clip_sizes(setting: Setting) -> list[Grid]:
    """Return sizes within the limits: an image, half the length and the full length, each square, wide and high."""
    stride, patch = setting.model.autoencoder.stride, setting.model.backbone.patch
    step_h, step_w = stride.h * patch.h, stride.w * patch.w
    longest = (setting.data.max_frames - 1) // stride.t
    sizes = []
    for chunks, ratio in itertools.product((0, (longest + 1) // 2, longest), (1.0, 1.5, 1 / 1.5)):
        height = max(1, math.floor(math.sqrt(setting.data.max_pixels / ratio) / step_h)) * step_h
        max_width = max(1, setting.data.max_pixels // height // step_w)
        width = min(max_width, max(1, round(height * ratio / step_w))) * step_w
        sizes.append(Grid(1 + chunks * stride.t, height, width))
    return sizes


def make_examples(setting: Setting, num_examples: int) -> list[SyntheticExample]:
    """Make examples of mixed sizes and captions, 15 % of them images, as in the quickstart's data."""
    generator = rng.make_generator(0, "benchmark")
    grids = [latent_grid(size, setting.model.autoencoder.stride) for size in make_clip_sizes(setting)]
    images, videos = [grid for grid in grids if grid.t == 1], [grid for grid in grids if grid.t > 1]
    examples = []
    for _ in range(num_examples):
        image = generator.random() < 0.15 or not videos
        candidates = images if image else videos
        caption = [part[int(generator.integers(len(part)))] for part in (*_WORDS[:2], ("",) if image else _WORDS[2])]
        examples.append(
            SyntheticExample(candidates[int(generator.integers(len(candidates)))], "a {} {}{}".format(*caption))
        )
    return examples


def make_latents(setting: Setting, index: int, example: SyntheticExample) -> np.ndarray:
    """Return random latents of an example."""
    shape = (*example.latents, setting.model.backbone.channels)
    return rng.make_generator(0, "benchmark latents", index).standard_normal(shape, np.float32)


def tokenize_bytes(config: Any, caption: str) -> np.ndarray:
    """Tokenize a caption like the byte encoder's tokenizer, without `transformers`."""
    tokens = [*(byte + 3 for byte in caption.encode()[: config.max_tokens - 1]), 1]
    return np.asarray(tokens + [0] * (-len(tokens) % config.patch), np.int32)


class SyntheticBatches:
    """Endless batches of packed rows, from examples in memory."""

    def __init__(self, setting: Setting, num_examples: int):
        self._setting, self._examples = setting, make_examples(setting, num_examples)
        model: ModelConfig = setting.model
        grids = [compute_token_grid(example.latents, model.backbone.patch) for example in self._examples]
        names = [example.caption for example in self._examples]
        tokenize = functools.partial(tokenize_bytes, model.text_encoder)
        captions = TokenizedCaptions([(name,) for name in names], tokenize)
        table = ExampleTable(names=SharedStrings(names), grids=np.asarray(grids, np.int32), captions=captions)
        self._planner = RowPlanner(table, model.row_shape, seed=0)
        self.padding = self._planner.get_epoch(0).padding
        self.num_sizes = len({example.latents for example in self._examples})

    def __iter__(self) -> Iterator[PackedBatch]:
        rows = (self._pack_row(number) for number in itertools.count())
        while True:
            yield stack_rows(itertools.islice(rows, self._setting.denoiser.batch))

    def _pack_row(self, row_index: int) -> PackedBatch:
        model: ModelConfig = self._setting.model
        patch, examples = model.backbone.patch, []
        for index, rank in zip(*self._planner.get_row(row_index), strict=True):
            example = self._examples[index]
            tokens = patchify(make_latents(self._setting, int(index), example), patch)
            positions = compute_positions(compute_token_grid(example.latents, patch))
            caption = tokenize_bytes(model.text_encoder, example.caption)
            examples.append(PackedExample(tokens, positions, caption, rank))
        return pack(examples, model.row_shape, width=model.backbone.token_width)
