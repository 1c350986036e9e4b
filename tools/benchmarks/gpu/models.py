"""Training steps of the GPU benchmark: models, rows and programs, made as `train.py` makes them."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.timer import TimeBudget
from dit_video.core import rng
from dit_video.core.platform.devices import get_default_platform
from dit_video.core.trees import count_values, flatten
from dit_video.diffusion import FlowMatching, LogitNormal, RectifiedFlow
from dit_video.distributed import Parallelism, make_mesh, make_shardings, shard_batch
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.flops import count_training_flops
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.encoders import FrozenTextConfig
from dit_video.nn import Remat, get_graph_def, init_params
from dit_video.planning import (
    Chip,
    CompiledStep,
    Efficiencies,
    StepSpec,
    Topology,
    compile_step,
    compute_step_times,
    count_argument_bytes,
    count_step_costs,
    estimate_step,
    find_chip,
    find_efficiencies,
    get_calibration_folder,
    read_calibration,
)
from dit_video.planning.efficiencies import CalibrationSize, calibrate
from dit_video.tokens import (
    Grid,
    LayoutShape,
    PackedBatch,
    PackedExample,
    PackedShape,
    compute_positions,
    pack,
    stack_rows,
)
from dit_video.training.losses.denoiser import DenoiserLoss
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from dit_video.training.state import make_on_devices
from dit_video.training.step import GradientStep, make_step_program

PLANNED_REMATS: tuple[Remat, ...] = ("none", "dots_attention", "attention", "full")
"""Policies that plans try."""
_SLACK = 1.1
"""Largest estimate of a policy's memory that is compiled, relative to the device's."""
_WARMUP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class TrainingSize:
    """Models and rows of tokens."""

    models: dict[str, DiTConfig]
    tokens: int
    clips: dict[int, tuple[Grid, ...]]
    """Token grids of the clips of a row, by their number."""
    text: int
    """Number of text tokens of each clip."""
    steps: int = 10
    """Number of steps; their median counts."""
    calibration: CalibrationSize | None = None
    """Sizes of calibration; None for those for the platform."""


def _make_model(width: int, layers: int, heads: int, context_width: int = 4096) -> DiTConfig:
    return DiTConfig(
        channels=16, context_width=context_width, width=width, layers=layers, heads=heads, dtype="bfloat16"
    )


FULL = TrainingSize(
    models={"1.3 B": _make_model(2048, 19, 16), "0.1 B": _make_model(768, 10, 6)},
    tokens=32_768,
    # 81 frames of 480×832, and 13 frames of 512×512.
    clips={1: (Grid(21, 30, 52),), 8: (Grid(4, 32, 32),) * 8},
    text=128,
)
SMALL = TrainingSize(
    models={"0.1 B": _make_model(32, 2, 2, context_width=8)},
    tokens=128,
    clips={1: (Grid(2, 8, 8),), 8: (Grid(1, 4, 4),) * 8},
    text=4,
    steps=2,
    calibration=CalibrationSize(
        width=64, mlp_dim=128, head_width=16, tokens=256, dense_tokens=128, copy_bytes=2**20, repeats=2
    ),
)


class Machine(NamedTuple):
    """The device that is measured on."""

    topology: Topology
    efficiencies: Efficiencies
    """Shares of the peak rates: published ones, or a calibration's."""
    memory: int
    """Bytes of memory that a program can have."""

    @property
    def chip(self) -> Chip:
        return self.topology.chip


def find_machine(size: TrainingSize) -> Machine:
    """Return the machine; a CPU's peak rates are measured.

    Raises:
      UserError: If the device is neither a CPU nor in the table of chips.
    """
    device = jax.devices()[0]
    chip = find_chip(device)
    calibration = read_calibration(get_calibration_folder(), "cpu" if chip is None else chip.name)
    if chip is None:
        if calibration is None:
            calibration = calibrate([device], size=size.calibration)
        chip = calibration.chip
    limit = (device.memory_stats() or {}).get("bytes_limit", chip.memory)
    return Machine(Topology(chip, (1,)), find_efficiencies(chip, calibration), int(limit))


class Training(NamedTuple):
    """The training of a model on rows of one shape, on one device."""

    config: BackboneConfig
    row_shape: LayoutShape
    batch: PackedBatch
    costs: StepSpec
    """Counted costs of a step."""
    model_flops: int
    """Operations of the model in a step, without recomputation."""
    step: GradientStep
    mesh: Mesh

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Return random parameters. Traceable."""
        return {"backbone": init_params(self.config.make, key), "text": {}}

    def get_program(self) -> tuple[Any, tuple[Any, ...]]:
        """Return the jitted step and the shapes of its arguments."""
        return make_step_program(self.step, self.init, self.batch, self.mesh)

    def compile(self) -> CompiledStep:
        """Compile the step, for its plan and to run it."""
        return compile_step(*self.get_program(), self.mesh)

    def init_state(self) -> Any:
        """Return the state before the first step, on the device."""
        layout = functools.partial(make_shardings, mesh=self.mesh)
        random_key = rng.key(0, "gpu benchmark")
        return make_on_devices(lambda key: self.step.init(self.init(key)), random_key, shardings=layout)

    @property
    def parameter_count(self) -> int:
        return count_values(jax.eval_shape(self.init, jax.random.key(0)))


def make_row_training(size: TrainingSize, model: str, clips: int, remat: Remat) -> Training:
    """Return the training of a model on one row with a number of clips."""
    config, grids = size.models[model].replace(remat=remat), size.clips[clips]
    shape = PackedShape(tokens=size.tokens, text=clips * size.text, segments=clips)
    examples = make_examples(config, grids, text=size.text)
    return make_training(config, shape, make_batch(config, shape, [examples]), [(grids, size.text)])


def make_training(
    config: BackboneConfig, shape: LayoutShape, batch: PackedBatch, rows: Sequence[tuple[Sequence[Grid], int]]
) -> Training:
    """Return the training of a model on batches of the shape of `batch`.

    Args:
      config: Config of the model.
      shape: Shape of a row.
      batch: A batch of rows.
      rows: Grids of the clips of every row, and the text tokens of each of them.
    """
    mesh = make_mesh(Parallelism(), jax.devices()[:1])
    text = FrozenTextConfig(folder="random", width=config.context_width)
    loss = DenoiserLoss(
        backbone=get_graph_def(config.make),
        text_encoder=get_graph_def(text.make),
        objective=FlowMatching(process=RectifiedFlow(shift=3.0), times=LogitNormal()),
        caption_dropout=0.1,
        empty_caption=np.zeros((1, config.context_width), np.float32),
        seed=0,
    )
    optimizer = AdamW(schedule=Constant(warmup=2000), b2=0.95, weight_decay=0.01).make(steps=100_000)
    grids, text_tokens = rows[0]
    return Training(
        config=config,
        row_shape=shape,
        batch=batch,
        costs=count_step_costs(
            config, shape, get_default_platform(), rows=len(rows), clips=grids, texts=[text_tokens] * len(grids)
        ),
        model_flops=sum(count_training_flops(config, clips, [text] * len(clips)) for clips, text in rows),
        step=GradientStep(loss=loss, optimizer=optimizer, ema_decay=0.9999),
        mesh=mesh,
    )


def make_examples(config: BackboneConfig, grids: Sequence[Grid], *, text: int, first: int = 0) -> list[PackedExample]:
    """Return clips of these grids, with texts of so many tokens; both are slices of the same random values."""
    values = draw_values(max(grid.volume for grid in grids) * config.token_width + first)
    embeddings = draw_values(text * config.context_width).reshape(text, config.context_width)
    return [
        PackedExample(
            values[first : first + grid.volume * config.token_width].reshape(grid.volume, config.token_width),
            compute_positions(grid),
            embeddings,
            first + index,
        )
        for index, grid in enumerate(grids)
    ]


@functools.lru_cache(maxsize=8)
def draw_values(count: int) -> np.ndarray:
    """Return random values, the same at every call."""
    return rng.make_generator(0, "gpu benchmark").standard_normal(count, np.float32)


def make_batch(config: BackboneConfig, shape: LayoutShape, rows: Sequence[Sequence[PackedExample]]) -> PackedBatch:
    """Return rows of clips."""
    width, text_width = config.token_width, config.context_width
    return stack_rows([pack(examples, shape, width=width, text_width=text_width) for examples in rows])


def rank_remats(training: Training, machine: Machine) -> list[Remat]:
    """Return the policies whose estimated memory nearly fits, the fastest, and then the smallest, first."""
    _, arguments = training.get_program()
    state_bytes, mesh = count_argument_bytes(arguments), dict(training.mesh.shape)
    shapes = flatten(jax.eval_shape(training.init, jax.random.key(0)))
    stacked = [leaf for path, leaf in shapes.items() if "backbone/blocks/" in path]
    layer_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in stacked) // training.config.layers
    costs_of: dict[Remat, tuple[float, int]] = {}
    for remat in PLANNED_REMATS:
        costs = training.costs.resize(training.costs.rows, remat)
        memory, work = estimate_step(costs, state_bytes, layer_bytes, mesh)
        if memory.peak <= _SLACK * machine.memory:
            costs_of[remat] = compute_step_times(work, machine.topology, mesh).apart, memory.peak
    return sorted(costs_of, key=costs_of.__getitem__)


def choose_remat(
    make: Callable[[Remat], Training], machine: Machine
) -> tuple[Training, CompiledStep, list[str]] | None:
    """Return the training with the fastest policy whose compiled step fits, the step, and what else was compiled.

    Args:
      make: Function from a policy to the training.
      machine: The machine.

    Returns:
      None if no policy fits.
    """
    too_large: list[str] = []
    for remat in rank_remats(make("full"), machine):
        training = make(remat)
        compiled = training.compile()
        if fits(compiled, machine):
            return training, compiled, too_large
        too_large.append(f"{remat}: {compiled.memory.peak / 2**30:.1f} GiB")
    return None


def fits(compiled: CompiledStep, machine: Machine) -> bool:
    """Return True if a step was compiled and its memory is within the machine's."""
    return compiled.executable is not None and compiled.memory.peak <= machine.memory


class TimedSteps(NamedTuple):
    """Steps that were timed."""

    seconds: list[float]
    loss: float
    """Loss of the last one."""
    repeat: Callable[[int], Any]
    """Function that runs so many steps more, and returns the state."""


def time_steps(training: Training, compiled: CompiledStep, budget: TimeBudget, steps: int) -> TimedSteps:
    """Run the compiled step, and return the seconds of each of up to `steps` steps.

    It is at least one step, after the warmup.
    """
    executable = compiled.executable
    assert executable is not None
    state, batch = training.init_state(), shard_batch(training.batch, training.mesh)
    jax.block_until_ready((state, batch))
    seconds: list[float] = []
    while len(seconds) < _WARMUP_STEPS + 1 or (len(seconds) < _WARMUP_STEPS + steps and not budget.is_spent):
        start = time.perf_counter()
        state, metrics = executable(state, batch, ())
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)

    def repeat(count: int) -> Any:
        nonlocal state
        for _ in range(count):
            state, _ = executable(state, batch, ())
        return state

    return TimedSteps(seconds[_WARMUP_STEPS:], float(metrics["loss"]), repeat)
