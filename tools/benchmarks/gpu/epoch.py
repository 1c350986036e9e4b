"""One epoch over clips of mixed sizes: each padded to the largest, in buckets of one size, and packed into rows.

All have batches of the same number of tokens. Buckets resize and crop clips to a few sizes, so they train on fewer
tokens of a clip (`kept tokens`); rows and padding keep all. Batches are made by a thread, two ahead of the device.
The idle share is that of the epoch in which the device does not work on a step: one minus the seconds of all steps on
batches that are on the device already.
"""

import functools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.gpu.figures import DETAILS, Case, Figure
from benchmarks.gpu.models import FULL as TRAINING
from benchmarks.gpu.models import SMALL as SMALL_TRAINING
from benchmarks.gpu.models import TrainingSize, make_batch, make_examples, make_training
from benchmarks.steps import count_compilations
from benchmarks.timer import TimeBudget
from dit_video.core import rng
from dit_video.core.shared_array import SharedStrings
from dit_video.data.buckets import BatchMemory, BucketPlanner, plan_buckets
from dit_video.data.captions import TokenizedCaptions
from dit_video.data.examples import ExampleTable
from dit_video.data.packing.plan import RowPlanner
from dit_video.distributed import shard_batch
from dit_video.tokens import Grid, LayoutShape, PackedBatch, PackedShape

METHODS = ("padded", "buckets", "packed")
MIN_SPEEDUP = 1.5
"""Clips per second of packed rows relative to buckets that are aimed for."""
_AHEAD = 2
"""Number of batches that are made ahead."""
_STEPS = 3
"""Number of steps on the device that are timed for every shape."""


@dataclass(frozen=True, kw_only=True)
class EpochSize:
    """Model, clips and batches."""

    training: TrainingSize
    model: str = "0.1 B"
    clips: int = 512
    frames: tuple[int, ...] = (1, 3, 5, 9, 13, 21)
    """Numbers of latent frames; each clip has one of them."""
    sides: tuple[tuple[int, int], ...] = ((16, 16), (16, 24), (24, 16), (20, 20), (20, 32), (32, 20), (32, 16))
    """Heights and widths in tokens; each clip has one of them."""
    buckets: int = 8
    segments: int = 32
    """Largest number of clips in a row."""


FULL = EpochSize(training=TRAINING)
SMALL = EpochSize(
    training=SMALL_TRAINING, clips=24, frames=(1, 2, 4), sides=((2, 2), (2, 4), (4, 4)), buckets=3, segments=8
)


class BatchPlan(NamedTuple):
    """Batches of an epoch."""

    steps: Sequence[tuple[LayoutShape, list[list[int]]]]
    """Shape of the rows of every step, and the clips of each row by number."""
    grids: list[Grid]
    """Size of every clip, as it is trained on."""
    padding: float
    """Share of tokens that are padding."""
    kept: float
    """Share of the clips' tokens that is trained on."""

    @property
    def shapes(self) -> dict[LayoutShape, int]:
        """Return the index of the first step of every shape."""
        return {shape: index for index, (shape, _) in reversed(list(enumerate(self.steps)))}


def list_cases(size: EpochSize) -> list[Case]:
    """Return a case that measures all methods, whose speeds are compared."""
    figures = [
        Figure(name=f"{method}: {name}", unit=unit)
        for method in METHODS
        for name, unit in (
            ("clips per second", ""),
            ("idle", "%"),
            ("padding", "%"),
            ("kept tokens", "%"),
            ("compilations", ""),
        )
    ]
    ratios = (
        Figure(name="clips per second, packed / buckets", target=f">= {MIN_SPEEDUP}"),
        Figure(name="tokens of clips per second, packed / buckets"),
    )
    return [Case(name="epoch", figures=(*figures, *ratios), measure=functools.partial(measure, size))]


def draw_grids(size: EpochSize) -> list[Grid]:
    """Return the sizes of the clips, in tokens."""
    generator = rng.make_generator(0, "gpu benchmark epoch")
    frames, sides = generator.choice(size.frames, size.clips), generator.integers(len(size.sides), size=size.clips)
    return [Grid(int(t), *size.sides[index]) for t, index in zip(frames, sides, strict=True)]


def plan_batches(method: str, size: EpochSize) -> BatchPlan:
    """Return the batches of an epoch by one of `METHODS`, each of as many tokens as a row has at most."""
    grids, row_tokens, text = draw_grids(size), size.training.tokens, size.training.text
    tokens = np.asarray([grid.volume for grid in grids])
    captions = TokenizedCaptions([("",)] * len(grids), lambda _: np.zeros(text, np.int32))
    names = SharedStrings(map(str, range(len(grids))))
    table = ExampleTable(names=names, grids=np.asarray(grids, np.int32), captions=captions)
    if method == "padded":
        shape = PackedShape(tokens=int(tokens.max()), text=text, segments=1)
        batch = max(1, row_tokens // shape.tokens)
        order = rng.make_generator(0, "gpu benchmark order").permutation(len(grids)).tolist()
        # The last batch continues with the first clips.
        order += order[: -len(order) % batch]
        steps = [(shape, [[index] for index in order[start : start + batch]]) for start in range(0, len(order), batch)]
        return BatchPlan(steps, grids, 1 - float(tokens.mean()) / shape.tokens, 1.0)
    if method == "buckets":
        memory = BatchMemory(fixed=0, per_token=1)
        buckets = plan_buckets(np.asarray(grids), memory, budget=row_tokens, text=text, count=size.buckets)
        planner = BucketPlanner(table, buckets, seed=0)
        trained = [buckets.buckets[index].size for index in buckets.assignment]
        drawn = (planner.get_batch(step) for step in range(round(planner.steps_per_epoch)))
        dense = [(rows[0].shape, [[row.entries[0].example] for row in rows]) for rows in drawn]
        return BatchPlan(dense, trained, 0.0, buckets.token_retention)
    shape = PackedShape(tokens=row_tokens, text=size.segments * text, segments=size.segments)
    plan = RowPlanner(table, shape, seed=0).get_epoch(0)
    return BatchPlan([(shape, [row]) for row in plan.rows], grids, plan.padding, 1.0)


def measure(size: EpochSize, budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    """Yield the figures of all methods, and their ratios.

    Raises:
      UserError: If the time of the part was spent.
    """
    speeds: dict[str, float] = {}
    tokens: dict[str, float] = {}
    for method in METHODS[::-1]:
        budget.check()
        plan = plan_batches(method, size)
        run = _run_epoch(plan, size, budget)
        yield DETAILS, {f"{method}: {name}": value for name, value in run._asdict().items()}
        speeds[method] = run.clips / run.seconds
        tokens[method] = speeds[method] * float(np.mean([grid.volume for grid in plan.grids]))
        yield f"{method}: clips per second", speeds[method]
        yield f"{method}: idle", max(0.0, 1 - run.device_seconds / run.seconds)
        yield f"{method}: padding", plan.padding
        yield f"{method}: kept tokens", plan.kept
        yield f"{method}: compilations", run.compilations
        if method == "buckets":
            yield "clips per second, packed / buckets", speeds["packed"] / speeds["buckets"]
            yield "tokens of clips per second, packed / buckets", tokens["packed"] / tokens["buckets"]


class EpochRun(NamedTuple):
    """Measurements of an epoch, or of its part within the budget."""

    device_seconds: float
    """Seconds of its steps on batches that are on the device already."""
    seconds: float
    """Seconds that it took, without compilation."""
    clips: int
    """Number of clips that were trained on."""
    compilations: int
    """Number of programs of the step."""


def _run_epoch(plan: BatchPlan, size: EpochSize, budget: TimeBudget) -> EpochRun:
    """Train for an epoch; first compile every program, and time it on a batch on the device."""
    config = size.training.models[size.model].replace(remat="dots_attention")
    make = functools.partial(_make_batch, config, plan, size)
    first = make(0)
    rows = [([plan.grids[i] for i in row], size.training.text) for row in plan.steps[0][1]]
    training = make_training(config, plan.steps[0][0], first, rows)
    state, mesh = training.init_state(), training.mesh
    step = training.step.compile(state=state)
    step_seconds: dict[LayoutShape, float] = {}
    compilations = 0
    for shape, index in plan.shapes.items():
        batch, seconds = shard_batch(make(index), mesh), []
        with count_compilations() as compiled:
            for _ in range(_STEPS + 1):
                start = time.perf_counter()
                state, metrics = step(state, batch)
                jax.block_until_ready((state, metrics))
                seconds.append(time.perf_counter() - start)
            compilations += compiled()
        step_seconds[shape] = statistics.median(seconds[1:])
        budget.check()
    busy, clips, start = 0.0, 0, time.perf_counter()
    with count_compilations() as compiled:
        batches = iterate_ahead(make, range(len(plan.steps)))
        for (shape, members), batch in zip(plan.steps, batches, strict=True):
            state, metrics = step(state, shard_batch(batch, mesh))
            busy += step_seconds[shape]
            clips += sum(map(len, members))
            if budget.is_spent:
                break
        jax.block_until_ready((state, metrics))
        seconds_in_all = time.perf_counter() - start
        compilations += compiled()
    return EpochRun(busy, seconds_in_all, clips, compilations)


def _make_batch(config: Any, plan: BatchPlan, size: EpochSize, index: int) -> PackedBatch:
    shape, rows = plan.steps[index]
    examples = [make_examples(config, [plan.grids[i] for i in row], text=size.training.text) for row in rows]
    return make_batch(config, shape, examples)


def iterate_ahead(make: Callable[[int], Any], indices: Sequence[int]) -> Iterator[Any]:
    """Yield `make(index)` of every index, computed by a thread a few ahead."""
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Any] = deque()
        for index in indices:
            pending.append(pool.submit(make, index))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
