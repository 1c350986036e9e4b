"""Train an experiment on a folder of clips, sample it and write its report.

    python experiments/train.py experiments/configs/clips.py --data CLIPS --workdir runs/clips

CLIPS holds video files of any size and length, with a `metadata.csv` (`file_name,text`), or is a data set that
`tools/ingest.py` made, which may lie at an address (`gs://…`), as the latents may: `--latents gs://…`. Any scalar of
the config can be set on the command line: `--denoiser.steps 2000`; `--help` after the config lists them. Interrupted,
the same command continues where it was; SIGTERM and Ctrl-C let a training save its state and end with exit code 0.
Started as several processes, on one host or many (see experiments/launch), it is one run. With `--autoencoder-only` it
stops when the autoencoder is trained and reports that; the same command without it goes on from there.
"""

from dit_video.platform.huge_pages import use_huge_pages

use_huge_pages(__name__)

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from dit_video.core import config_json
from dit_video.core.errors import MissingError, Stopped, UserError, script
from dit_video.distributed.heartbeat import Patience
from dit_video.distributed.processes import first_goes_first, joined
from dit_video.evaluation import evaluate
from dit_video.experiment import Experiment, datasets
from dit_video.experiment.run import Run
from dit_video.platform.compilation_cache import keep_programs
from dit_video.platform.provenance import code_version
from dit_video.reports.run_report import report_autoencoder, report_run
from dit_video.training.folder_lock import locked
from dit_video.training.preemption import terminable


@dataclass(frozen=True)
class Arguments:
    """What a training run is given besides its config."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    data: tuple[str, ...]
    """folders of clips, or data sets that tools/ingest.py made; several are mixed by the config's data.weights"""
    latents: str | None = None
    """where cached latents are, or are to be written: a folder or gs://…; WORKDIR/latents by default"""
    checkpoints: str | None = None
    """where checkpoints are kept, and are found again if WORKDIR is lost: a folder or gs://…; WORKDIR by default"""
    workdir: Path | None = None
    """the run's folder; runs/NAME by default"""
    autoencoder_only: bool = False
    """stop when the autoencoder is trained, and report what it makes of the held-out clips; without it, go on"""
    profile: tuple[int, int] | None = None
    """the first and the last step that are traced for XProf and TensorBoard, such as --profile 10 12, of the denoiser
    (of the autoencoder with --autoencoder-only); the trace is in WORKDIR/denoiser/profile"""
    cache: bool = True
    """whether compiled programs are kept for the next start, in ~/.cache/dit_video/programs"""
    stopped_code: int = 0
    """the exit code after SIGTERM or Ctrl-C; for a manager that takes 0 for finished, such as Kubernetes, give 75"""
    patience: Patience = field(default_factory=Patience)
    """how long the processes of a run wait for each other"""


def main() -> None:
    config, *rest = sys.argv[1:] or [""]
    if config in ("-h", "--help"):
        print(__doc__)
        return
    if not config or config.startswith("-"):
        raise UserError("name a config first: train.py experiments/configs/clips.py --data CLIPS")
    arguments = tyro.cli(
        Arguments,
        args=rest,
        default=Arguments(experiment=load_experiment(Path(config)), data=tyro.MISSING),
        prog=f"train.py {config}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    if arguments.cache:
        keep_programs()
    workdir = arguments.workdir or Path("runs") / arguments.experiment.name
    if not arguments.data:
        raise UserError("--data names no folder; give one or more: --data CLIPS")
    datasets.check(arguments.data)  # before a run is made of it
    began = time.perf_counter()
    config = config_json.to_json(arguments.experiment)
    Stopped.code = arguments.stopped_code
    with terminable(), joined(config, code=code_version(), patience=arguments.patience), locked(workdir):
        with first_goes_first():
            run = dataclasses.replace(Run.create(workdir, arguments.experiment), profile=arguments.profile)
        if arguments.autoencoder_only:
            metrics = train_autoencoder(run, arguments.data, checkpoints=arguments.checkpoints)
        else:
            metrics = train(run, arguments.data, latents=arguments.latents, checkpoints=arguments.checkpoints)
    if quality := metrics.get("reconstruction"):
        linear = f"; linear {quality['linear_psnr']:.1f} dB" if "linear_psnr" in quality else ""
        print(f"reconstruction of held-out clips: {quality['psnr']:.1f} dB, SSIM {quality['ssim']:.3f}{linear}")
    if jax.process_index() == 0:
        print(f"{(time.perf_counter() - began) / 60:.1f} minutes; look at {workdir / 'report.html'}")


def train_autoencoder(run: Run, data: Sequence[str], *, checkpoints: str | None = None) -> dict[str, Any]:
    """Train the autoencoder alone and report it; returns the figures."""
    run.prepare(*data, checkpoints=checkpoints)
    if jax.process_index() != 0:
        run.train_autoencoder()
        return {}
    measured = evaluate.evaluate_autoencoder(run, run.folder)
    report_autoencoder(run.folder / "report.html", run, measured)
    return measured.metrics


def train(
    run: Run, data: Sequence[str], *, latents: str | None = None, checkpoints: str | None = None
) -> dict[str, Any]:
    """Train, sample and report; returns the figures."""
    experiment, workdir = run.experiment, run.folder
    pipeline = run.train(*data, latents=latents, checkpoints=checkpoints)
    if jax.process_index() != 0:  # one reports for all
        return {}
    measured = evaluate.evaluate(pipeline, workdir, seed=experiment.seed, run=run)
    report_run(
        workdir / "report.html",
        pipeline,
        measured,
        title=experiment.name,
        source=workdir,
        config=config_json.to_json(experiment),
    )
    return measured.metrics


def load_experiment(path: Path) -> Experiment:
    """The `EXPERIMENT` of a config file.

    Raises:
      MissingError: no such file.
      UserError: a file that defines no `EXPERIMENT`.
    """
    if not path.is_file():
        raise MissingError(f"no such config: {path}; name a file such as experiments/configs/clips.py")
    specification = importlib.util.spec_from_file_location("experiment_config", path)
    if specification is None or specification.loader is None:
        raise UserError(f"{path} is not a Python file; a config is a file such as experiments/configs/clips.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    experiment = getattr(module, "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} defines no EXPERIMENT; assign it an Experiment(...)")
    return experiment


if __name__ == "__main__":
    script(main)()
