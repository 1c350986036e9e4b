"""Measure how distances of sets of clips grow with distortions of known severity."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import itertools
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import script
from dit_video.core.files import write_json
from dit_video.core.rng import make_generator
from dit_video.evaluation.clip_set import ClipSet, open_clip_set
from dit_video.evaluation.distortions import SEVERITIES, distort
from dit_video.evaluation.metrics.distributions import FrechetMetric, MomentPair
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.evaluation.protocol import ClipSampling
from dit_video.scenes import draw_scene, render
from dit_video.scenes.draw import FPS
from dit_video.scenes.features import SceneFeatures
from dit_video.tokens import Grid
from dit_video.video import Clip

_BATCH = 32
_SIZES = (Grid(17, 48, 48),)


def main(out: Path, count: int = 2048, seed: int = 2 * 10**6, clips: Path | None = None) -> None:
    """Measure how distances of sets of clips grow with distortions of known severity.

    Two sets of rendered scenes are compared by the Fréchet distance of the features of the scene classifier, one of
    them distorted; also the distorted clips with the same ones before, where no difference of scenes is in the way.
    With a folder of clips, the sets are crops of these at random positions instead.

    For example:

        python tools/metric_sensitivity.py --out docs/figures/metric_sensitivity.json
        python tools/metric_sensitivity.py --out sensitivity.json --count 256 --clips CLIPS

    Args:
        out: JSON file to write.
        count: Number of clips of each set.
        seed: Seed of the scenes, or of the crops.
        clips: Folder of clips to crop; scenes are rendered by default.
    """
    check_minimum(64, count=count)
    iterate = partial(_iterate_scenes if clips is None else partial(_iterate_crops, open_clip_set(clips)), count)
    metric = FrechetMetric(features=SceneFeatures(), name="distance", label="distance")
    kinds: list[tuple[str, float]] = [(kind, each) for kind, severities in SEVERITIES.items() for each in severities]
    plain = metric.init()
    states = {each: metric.init() for each in kinds}
    real = metric.init()
    start, memory = time.perf_counter(), []
    for number, batch in enumerate(_make_batches(iterate(seed))):
        real = metric.update(real, MetricBatch(real_clips=batch))
        if number == 0:
            memory.append(_measure_memory())
    memory.append(_measure_memory())
    for number, batch in enumerate(_make_batches(iterate(seed + 1))):
        plain = metric.update(plain, MetricBatch(samples=batch))
        for kind, severity in kinds:
            generator = make_generator(seed, f"{kind} {severity}", number)
            samples = [distort(clip, kind, severity, generator) for clip in batch]
            states[kind, severity] = metric.update(states[kind, severity], MetricBatch(samples=samples))
    memory.append(_measure_memory())
    itself = metric.merge(real, MomentPair(samples=real.real_clips))
    rows = [{"distortion": "itself", "severity": 0.0, **_compute(metric, itself)}]
    for (kind, severity), state in {("none", 0.0): plain, **states}.items():
        paired = _compute(metric, MomentPair(samples=state.samples, real_clips=plain.samples))["distance"]
        values = _compute(metric, metric.merge(state, real))
        rows.append({"distortion": kind, "severity": severity, **values, "paired": paired})
    for row in rows:
        low, high = row["interval"]
        paired = f", from the same clips {row['paired']:.4f}" if "paired" in row else ""
        print(f"{row['distortion']} {row['severity']:g}: {row['distance']:.4f} ({low:.4f} to {high:.4f}){paired}")
    print(f"memory after the first batch, the first set, all: {', '.join(f'{each:.0f}' for each in memory)} MiB")
    seconds = round(time.perf_counter() - start, 1)
    write_json(
        out,
        {
            "clips": "scenes" if clips is None else "crops",
            "count": count,
            "seed": seed,
            "seconds": seconds,
            "memory_mib": memory,
            "rows": rows,
        },
    )


def _make_batches(clips: Iterator[Clip]) -> Iterator[list[Clip]]:
    while batch := list(itertools.islice(clips, _BATCH)):
        yield batch


def _iterate_scenes(count: int, seed: int) -> Iterator[Clip]:
    for number in range(count):
        yield render(draw_scene(number, seed=seed, level=1 + number % 3, sizes=_SIZES)).clip


def _iterate_crops(clips: ClipSet, count: int, seed: int) -> Iterator[Clip]:
    """Yield square crops of at least half of a clip's shorter side, as many of each clip, at the size of the scenes."""
    size = _SIZES[0]
    sampling = ClipSampling(frames=size.t, size=(size.h, size.w))
    for index, numbers in enumerate(np.array_split(np.arange(count), len(clips.names))):
        clip = clips.read(index, None)
        # At the rate of the scenes, or a higher one where a clip is short.
        step = max(1, min(round(clip.fps / FPS), (len(clip.frames) - 1) // (size.t - 1)))
        clip = replace(clip, frames=clip.frames[::step])
        for number in numbers.tolist():
            generator = make_generator(seed, "crop", number)
            side = int(generator.integers(min(clip.height, clip.width) // 2, min(clip.height, clip.width) + 1))
            rooms = np.subtract(clip.frames.shape[:3], (size.t, side, side))
            start, top, left = generator.integers(np.maximum(rooms, 0) + 1).tolist()
            frames = clip.frames[start : start + size.t, top : top + side, left : left + side]
            yield sampling.sample(replace(clip, frames=frames), seed=seed, number=number)


def _compute(metric: FrechetMetric, state: MomentPair) -> dict[str, Any]:
    values = metric.compute(state)
    distance = values["distance"]
    return {
        "distance": distance.value,
        "interval": distance.interval,
        "half": values["distance_half"].value,
        "limit": values["distance_limit"].value,
    }


def _measure_memory() -> float:
    """Return the peak memory of the process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
