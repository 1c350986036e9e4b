"""Train a text-to-video model from scratch on rendered clips, and write its samples and a report.

It renders captioned clips, trains an autoencoder and a diffusion transformer on them, samples every prompt, evaluates
the samples and writes runs/quickstart/report.html. This takes about a quarter of an hour on two CPU cores.
"""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))

from configs import quickstart, unet
from dit_video.apps.reports.run_report import write_run_report
from dit_video.core import config_json
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import check_devices, script
from dit_video.core.files import read_json, write_json
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.evaluation import evaluate
from dit_video.experiment.run import Run
from dit_video.sampling.pipeline_config import RUN_CONFIG as CONFIG
from dit_video.scenes import shapes
from dit_video.training.hooks.logging import Progress

_CONFIGS = {"quickstart": quickstart.make_experiment, "unet": unet.make_experiment}


def main(
    workdir: Path = Path("runs/quickstart"),
    config: Literal["quickstart", "unet"] = "quickstart",
    seed: int = 0,
    brief: bool = False,
    cache: bool = True,
) -> None:
    """Train a text-to-video model from scratch on rendered clips, and write its samples and a report.

    The default takes about a quarter of an hour on two CPU cores. After an interruption, run the same command again to
    continue.

    For example:

        python experiments/quickstart.py
        python experiments/quickstart.py --workdir runs/smoke-test --brief

    Args:
        workdir: Folder of the run.
        config: Config in experiments/configs: a diffusion transformer on packed rows, or a U-Net on canvases.
        seed: Seed of the data, the training and the samples.
        brief: Run a smoke test of about one minute, whose samples are of no use.
        cache: Keep compiled programs in ~/.cache/dit_video/programs, so that the next start is faster.
    """
    check_minimum(0, seed=seed)
    check_devices()
    if cache:
        enable_compilation_cache()
    start_time = time.perf_counter()
    experiment = _CONFIGS[config](seed, brief=brief)
    is_new = not (workdir / CONFIG).is_file()
    run = Run.create(workdir, experiment)
    count = quickstart.count_clips(brief=brief)
    with Progress("rendering clips", count, unit="clip") as progress:
        shapes.write_folder(workdir / "clips", count=count, seed=seed, progress=lambda done, _: progress.update(done))
    run.train(workdir / "clips")
    pipeline = run.load_pipeline()
    evaluation = run.evaluate(pipeline=pipeline)
    minutes = _record_minutes(workdir, time.perf_counter() - start_time if is_new else None)
    write_run_report(
        workdir / "report.html",
        pipeline,
        evaluation,
        title="A text-to-video model, trained from scratch",
        source=workdir,
        config=config_json.to_json(experiment),
        minutes=minutes,
    )
    evaluate.print_results(evaluation.results)
    print(("" if minutes is None else f"{minutes:.1f} minutes; ") + f"report: {workdir / 'report.html'}")


def _record_minutes(workdir: Path, seconds: float | None) -> float | None:
    """Return the minutes of a run that took a single start, or None if it was interrupted."""
    path = workdir / "timing.json"
    if seconds is not None:
        write_json(path, {"minutes": round(seconds / 60, 2)})
    return read_json(path)["minutes"] if path.is_file() else None


if __name__ == "__main__":
    script(parse_arguments)(main)
