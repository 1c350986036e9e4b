"""Compare ways to a video model: temporal layers alone, all layers, or from scratch; alternating or in groups."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import dataclasses
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments" / "configs"))

import scenes

import dit_video.scenes.protocols  # noqa: F401, registers its protocols
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import script
from dit_video.core.files import read_json, write_json
from dit_video.evaluation.evaluate import evaluate
from dit_video.evaluation.protocols import get_protocol
from dit_video.experiment import AllWeights, DataConfig, Experiment, Run, TemporalWeights, TrainDenoiser
from dit_video.models.backbones.conversion import add_temporal_layers
from dit_video.training.hooks.logging import read_metrics
from dit_video.training.optim.schedules import WarmupStableDecay

Regime = Literal["temporal", "full", "scratch"]
LAYERS = {"alternating": 1, "grouped": 2}
"""Spatial layers of a group, after which as many temporal layers follow."""
_AUTOENCODER = "autoencoder"
_VIDEOS = DataConfig(max_pixels=32 * 48, max_frames=17)
_IMAGE_FRAMES = DataConfig(max_pixels=32 * 48, max_frames=1)
METRICS = ("scene_colours", "scene_directions", "scene_distance")
_MEASURED_STEPS = 20
"""Number of steps of which the second half tells how long a step takes."""
_MEASURED_SEED = 1000
"""Seed of the trainings by which the time of a step is measured."""


class Training(NamedTuple):
    """A training of the comparison: the image model, or a way from it, or from nothing, to a video model."""

    regime: Regime | Literal["images"]
    layers: str
    seed: int

    @property
    def way(self) -> str:
        """Return the name of the way, which is trained with several seeds."""
        return "-".join(filter(None, (self.regime, self.layers)))

    @property
    def name(self) -> str:
        """Return its name, and that of its folder."""
        return f"{self.way}-{self.seed}"


def main(
    data: Path,
    out: Path,
    json: Path,
    minutes: float = 8.0,
    seeds: int = 3,
    count: int = 200,
    autoencoder_steps: int = 2500,
    part: int | None = None,
) -> None:
    """Compare ways to a video model: temporal layers alone, all layers, or from scratch; alternating or in groups.

    An image model is trained on single frames first, for as long as each video model is trained after it, or from
    nothing (Kandinsky Video, arXiv 2311.13073, trains temporal layers alone). The time of a step is measured for all
    ways before the first training, so run nothing else until then. Each training has as many steps as fit into these
    minutes by that time, however busy the machine is later.

    For example:

        python tools/temporal_regimes.py --data scenes --out runs/regimes --json docs/figures/temporal_regimes.json
        python tools/temporal_regimes.py --data scenes --out runs/regimes --json regimes.json --minutes 20 --part 3

    After an interruption, run the same command again to continue.

    Args:
        data: Clips of one object each, such as 3,000 of `tools/render_scenes.py --levels 1 --frames 17`.
        out: Folder of the runs.
        json: File of the results, to which each training adds its own.
        minutes: Minutes of each training.
        seeds: Number of seeds.
        count: Number of scenes that each model is sampled for.
        autoencoder_steps: Number of steps of the autoencoder, which all models share.
        part: Number of a training, to be the only one that is carried out; 0 is the first.
    """
    check_minimum(1, seeds=seeds, count=count, autoencoder_steps=autoencoder_steps)
    _train(out / _AUTOENCODER, make_autoencoder_experiment(out, steps=autoencoder_steps), data, out)
    trainings = [
        Training(regime, layers, seed)
        for seed in range(seeds)
        for regime, layers in (("images", ""), *((regime, layers) for regime in get_args(Regime) for layers in LAYERS))
    ]
    if not json.is_file():
        ways = [training._replace(seed=_MEASURED_SEED) for training in trainings if training.seed == 0]
        write_json(json, {"step_seconds": _measure_steps(ways, data, out), "results": []})
    for number, training in enumerate(trainings):
        found = read_json(json)
        if part in (None, number) and training.name not in [result["name"] for result in found["results"]]:
            result = _carry_out(training, data, out, minutes, count, found["step_seconds"][training.way])
            found = read_json(json)  # other parts may have ended meanwhile
            write_json(json, found | {"results": [*found["results"], result]})
    print_table(read_json(json)["results"])


def _measure_steps(trainings: Iterable[Training], data: Path, out: Path) -> dict[str, float]:
    """Return the seconds of a step of each way; the trainings start with the image model."""
    seconds = {}
    for training in trainings:
        run = _train(out / training.name, make_experiment(training, out, steps=_MEASURED_STEPS), data, out)
        entries = read_metrics(run.folder / "denoiser" / "metrics.jsonl")
        seconds[training.way] = float(np.median([entry["step_seconds"] for entry in entries[len(entries) // 2 :]]))
    return seconds


def _carry_out(
    training: Training, data: Path, out: Path, minutes: float, count: int, step_seconds: float
) -> dict[str, Any]:
    experiment = make_experiment(training, out, steps=max(_MEASURED_STEPS, int(60 * minutes / step_seconds)))
    start = time.perf_counter()
    run = _train(out / training.name, experiment, data, out)
    result: dict[str, Any] = {"name": training.name, **training._asdict(), "steps": experiment.denoiser.steps}
    result |= {"minutes": minutes, "count": count, "step_seconds": step_seconds, "seconds": time.perf_counter() - start}
    if training.regime == "images":
        return result
    protocol = get_protocol("scenes", metrics=METRICS, count=count, fields={"levels": [1]})
    values = evaluate(run.load_pipeline(), protocol, run.folder / "evaluation").results
    return result | {name: values[name].estimate.value for name in METRICS}


def _train(folder: Path, experiment: Experiment, data: Path, out: Path) -> Run:
    run = Run.create(folder, experiment)
    kind = "images" if experiment.data.max_frames == 1 else "videos"
    run.prepare(data, latents=None if folder.name == _AUTOENCODER else out / f"latents-{kind}")
    run.run_stages()
    return run


def make_autoencoder_experiment(out: Path, *, steps: int) -> Experiment:
    """Return the experiment of the autoencoder of all models, with a denoiser that makes a pipeline of it."""
    autoencoder = scenes.EXPERIMENT.autoencoder
    windows = tuple(window for window in autoencoder.windows if window.size.t <= _VIDEOS.max_frames)
    autoencoder = dataclasses.replace(autoencoder, windows=windows, steps=steps)
    denoiser = make_experiment(Training("images", "", 0), out, steps=1).denoiser
    return dataclasses.replace(scenes.EXPERIMENT, data=_VIDEOS, stages=(autoencoder, denoiser))


def make_experiment(training: Training, out: Path, *, steps: int) -> Experiment:
    """Return the experiment of a training, whose autoencoder, and image model, are those in `out`."""
    model = scenes.EXPERIMENT.get_model()
    backbone = model.backbone.replace(layers=4)
    start = str(out / Training("images", "", training.seed).name)
    weights: AllWeights | TemporalWeights = AllWeights()
    if training.regime != "images":
        group = LAYERS[training.layers]
        backbone = add_temporal_layers(backbone, spatial_layers=group, layers=group)
    if training.regime == "temporal":
        weights = TemporalWeights(init_from=start)
    elif training.regime == "full":
        weights = AllWeights(init_from=start)
    optimizer = dataclasses.replace(scenes.OPTIMIZER, schedule=WarmupStableDecay(warmup=min(50, steps // 4)))
    stage = TrainDenoiser(batch=10, optimizer=optimizer, steps=steps, ema_decay=0.995, train=weights)
    return dataclasses.replace(
        scenes.EXPERIMENT,
        name=training.name,
        seed=training.seed,
        data=_IMAGE_FRAMES if training.regime == "images" else _VIDEOS,
        model=dataclasses.replace(model, backbone=backbone, fps=8.0),
        autoencoder_from=str(out / _AUTOENCODER / "pipeline"),
        stages=(stage,),
        log_every=5,
    )


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the mean of each way over the seeds, with the smallest and the largest value."""
    ways = dict.fromkeys((result["regime"], result["layers"]) for result in results if result["regime"] != "images")
    print("| trained | layers | steps | " + " | ".join(METRICS) + " |")
    print("|" + "---|" * (3 + len(METRICS)))
    for regime, layers in ways:
        own = [result for result in results if (result["regime"], result["layers"]) == (regime, layers)]
        columns = [[result[name] for result in own] for name in ("steps", *METRICS)]
        cells = [f"{np.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})" for values in columns]
        print(f"| {regime} | {layers} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    script(parse_arguments)(main)
