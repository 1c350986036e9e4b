"""From nothing to a text-to-video model, its samples and a report, in a quarter of an hour on two CPU cores.

    python experiments/quickstart.py

renders captioned clips, trains an autoencoder and a diffusion transformer on them, samples every prompt, judges the
samples and writes runs/quickstart/report.html. Interrupted, the same command continues where it was.
"""

from dit_video.platform.huge_pages import use_huge_pages

use_huge_pages(__name__)

import sys
import time
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent))

from configs import quickstart
from dit_video.core import config_json
from dit_video.core.errors import script
from dit_video.core.files import read_json, write_json
from dit_video.data.synthetic import shapes
from dit_video.evaluation import evaluate
from dit_video.experiment.folder import CONFIG
from dit_video.experiment.run import Run
from dit_video.platform.compilation_cache import keep_programs
from dit_video.reports.run_report import report_run
from dit_video.training.hooks.logging import Progress


def main(workdir: Path = Path("runs/quickstart"), seed: int = 0, brief: bool = False, cache: bool = True) -> None:
    """Train, sample and report.

    Args:
        workdir: the run's folder.
        seed: of the data, the training and the samples.
        brief: a smoke test of a minute; its samples are no good.
        cache: whether compiled programs are kept for the next start, in ~/.cache/dit_video/programs.
    """
    if cache:
        keep_programs()
    began = time.perf_counter()
    experiment = quickstart.experiment(seed, brief=brief)
    anew = not (workdir / CONFIG).is_file()
    run = Run.create(workdir, experiment)
    count = quickstart.clips(brief=brief)
    with Progress("rendering clips", count, unit="clip") as progress:
        shapes.write_folder(workdir / "clips", count=count, seed=seed, progress=lambda done, _: progress.update(done))
    pipeline = run.train(workdir / "clips")
    measured = evaluate.evaluate(pipeline, workdir, seed=seed, run=run)
    minutes = _minutes(workdir, time.perf_counter() - began if anew else None)
    report_run(
        workdir / "report.html",
        pipeline,
        measured,
        title="A text-to-video model, from nothing",
        source=workdir,
        config=config_json.to_json(experiment),
        minutes=minutes,
    )
    _say(workdir, measured.metrics, minutes)


def _minutes(workdir: Path, seconds: float | None) -> float | None:
    """How long the run took, of the start that did it all; None where it took several."""
    path = workdir / "timing.json"
    if seconds is not None:
        write_json(path, {"minutes": round(seconds / 60, 2)})
    return read_json(path)["minutes"] if path.is_file() else None


def _say(workdir: Path, metrics: dict, minutes: float | None) -> None:
    following = metrics["prompt_following"]
    rates = ", ".join(f"{name} {following['all'][name]['rate']:.1%}" for name in ("colour", "direction", "shape"))
    print(f"prompt following: {rates}")
    print(f"reconstruction of held-out clips: {metrics['reconstruction']['psnr']:.1f} dB")
    print(("" if minutes is None else f"{minutes:.1f} minutes; ") + f"look at {workdir / 'report.html'}")


if __name__ == "__main__":
    script(tyro.cli)(main)
