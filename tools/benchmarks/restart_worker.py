"""A training of a benchmark's denoiser that prints its steps; `train_loop` starts, kills and restarts it.

python tools/benchmarks/restart_worker.py FOLDER [--config FILE] [--set NAME=VALUE …]
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.settings import Setting, SyntheticBatches, resolve_setting
from benchmarks.steps import make_denoiser_parts
from dit_video.core import rng
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.distributed import make_mesh
from dit_video.training import loop, trainer
from dit_video.training.hooks.hook import PeriodicCall
from dit_video.training.step import GradientStep

_STEPS, _SAVE_EVERY, _EXAMPLES = 10_000, 2, 200


class _RowIterator:
    """Iterator of the rows of a setting, from a step on."""

    hash = "benchmark"

    def __init__(self, setting: Setting, start: int):
        self._rows = itertools.islice(
            itertools.cycle(itertools.islice(SyntheticBatches(setting, _EXAMPLES), 4)), start, None
        )

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._rows)

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    enable_compilation_cache(arguments.folder / "programs")
    setting = resolve_setting(arguments.config, arguments.set)
    init, loss, optimizer = make_denoiser_parts(setting)

    def print_step(done: int, _state: Any) -> dict[str, float]:
        print(f"step {done}", flush=True)
        return {}

    trainer.Trainer(
        folder=arguments.folder / "denoiser",
        name="training",
        init=init,
        random_key=rng.key(0, "benchmark"),
        train_step=GradientStep(
            loss=loss, optimizer=optimizer.make(steps=_STEPS + optimizer.schedule.warmup), ema_decay=0.999
        ),
        config=loop.LoopConfig(steps=_STEPS, save_every=_SAVE_EVERY),
        mesh=make_mesh(setting.parallel),
        hooks=(PeriodicCall(every=1, function=print_step),),
    ).run(lambda start: _RowIterator(setting, start))


if __name__ == "__main__":
    main()
