"""Folders of training runs, as a process leaves them while it trains."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.video import Clip


def write_config(
    run: Path,
    *,
    curriculum: tuple[tuple[str, int], ...] = (),
    others: tuple[dict[str, Any], ...] = (),
    name: str = "ducks",
) -> None:
    """Write the config of a run of 20 steps of an autoencoder and 100 of a denoiser.

    `curriculum` has the names and steps of the denoiser's stages before, and `others` are stages of other packages.
    """
    averages = {"decays": [0.9], "sigmas": [0.1]}
    denoisers = [
        {"type": "dit_video.experiment:TrainDenoiser", "name": name, "continues": None, "steps": steps}
        for name, steps in curriculum
    ]
    denoisers.append(
        {
            "type": "dit_video.experiment:TrainDenoiser",
            "name": "denoiser",
            "continues": None,
            "steps": 100,
            "ema_decay": 0.999,
            "averages": averages,
        }
    )
    experiment = {
        "type": "dit_video.experiment:Experiment",
        "name": name,
        "stages": [
            {"type": "dit_video.experiment:TrainAutoencoder", "name": "autoencoder", "steps": 20},
            *others,
            *denoisers,
        ],
    }
    run.mkdir(parents=True, exist_ok=True)
    document = {"format": 1, "command": "python train.py", "experiment": experiment}
    (run / "experiment.json").write_text(json.dumps(document))


def write_models(run: Path, *names: str, is_joined: bool = True) -> None:
    """Write the config of a run of several models, each as `write_config` writes it; the last one is that of a join."""
    stages: list[dict[str, Any]] = []
    for name in names:
        write_config(run / name, name=name)
        experiment = json.loads((run / name / "experiment.json").read_text())["experiment"]
        stages.append({"type": "dit_video.experiment:TrainModel", "name": name, "experiment": experiment})
    if is_joined:
        join = {"name": "join", "last": names[-1], "previous": {name: {} for name in names[:-1]}}
        stages.append({"type": "dit_video.experiment:JoinPipelines", **join})
    experiment = {"type": "dit_video.experiment:Experiment", "name": "models", "stages": stages}
    document = {"format": 1, "command": "python train.py", "experiment": experiment}
    (run / "experiment.json").write_text(json.dumps(document))


def write_entries(
    run: Path, *steps: int, name: str = "denoiser", end: float | None = None, pace: float = 2.0, **values: Any
) -> None:
    """Append entries of these steps to a log, the last one at time `end` (now), `pace` seconds a step apart."""
    path = run / name / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.time() if end is None else end
    with path.open("a") as file:
        for step in steps:
            unix_seconds = end - pace * (steps[-1] - step)
            times = {"step_seconds": pace, "steps_per_second": 1 / pace, "data_wait": 0.1, "unix_seconds": unix_seconds}
            file.write(json.dumps({"step": step, "loss": 10 / (1 + step), **times, **values}) + "\n")


def write_grid(
    run: Path, step: int, *, name: str = "denoiser", kind: str = "samples", texts: tuple[str, ...] = ("a duck", "a fox")
) -> Path:
    """Write a grid of clips of 16 × 24 pixels side by side, whose shade is that of the step; return its file."""
    folder = run / name / kind
    folder.mkdir(parents=True, exist_ok=True)
    width = 26 * len(texts) - 2
    path = folder / f"{step:08}.mp4"
    Clip(np.full((4, 16, width, 3), step % 200, np.uint8), 8.0).save(path)
    tiles = [{"text": text, "left": 26 * number, "top": 0} for number, text in enumerate(texts)]
    sizes = {"height": 16, "width": width, "tile_height": 16, "tile_width": 24}
    (folder / "tiles.json").write_text(json.dumps({**sizes, "tiles": tiles}))
    return path


def write_checkpoint(run: Path, step: int, *, name: str = "denoiser", size: int = 2000) -> None:
    """Write a folder like that of a checkpoint."""
    folder = run / name / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "arrays").write_bytes(b"x" * size)


def write_evaluation(run: Path, step: int, label: str, value: float | None, *, name: str = "denoiser") -> None:
    """Write the results of an evaluation during training."""
    folder = run / name / "evaluations" / f"step_{step}"
    folder.mkdir(parents=True)
    results = [{"name": "x", "label": label, "value": value, "interval": None, "count": 3}]
    (folder / "metrics.json").write_text(json.dumps({"results": results}))
