"""Plan a training step without its hardware: compile it and report memory, FLOPs, communication, time and price.

    python tools/plan.py experiments/configs/wan_1_3b_480p.py --topology v5p:2x2x4
    python tools/plan.py experiments/configs/wan_14b_480p.py --topology v6e:16x16 --parallel fsdp=64,context=4 --rows 64
    python tools/plan.py experiments/configs/wan_14b_480p.py --topology v5p:4x4x8 --suggest --json plan.json
    python tools/plan.py experiments/configs/clips.py --topology h100:8          # analytic, unless 8 H100 are present
    python tools/plan.py experiments/configs/wan_1_3b_480p.py --topology v5e:4x4 --of sampler
    python tools/plan.py experiments/configs/wan_1_3b_480p.py --topology h100:1 --of sampler --fit 24GiB
    python tools/plan.py Wan2.1-T2V-1.3B-Diffusers --topology v5p:2x2x1 --of sampler --size 81x480x832 --offload layers
    python tools/plan.py Wan2.1-T2V-14B-Diffusers --topology v5p:2x2x1 --of sampler --fit 48GB
    python tools/plan.py Wan2.1-T2V-14B-Diffusers --topology h100:1 --train lora --fit 48GB
    python tools/plan.py --calibrate

The report says whether the step fits, the bytes on each device (parameters, optimizer, EMA, activations, temporary
buffers), the model's and the executed FLOPs, the bytes that each kind of collective moves along each mesh axis, the
limits of the time (the roofline), the expected time, and chip-hours and price. Plans for TPUs need `libtpu` (pip
install libtpu) but no TPU. For GPUs that are not present, everything is computed analytically and marked `analytic`.
`--suggest` searches meshes, rows and rematerialization; `--fit` searches the options that make the step fit into a
memory. `--calibrate` measures this machine's devices, and later plans for such chips expect what was measured. `--set`
changes any scalar of the config: `--set model.backbone.layers=20`.

For a pipeline's folder, the memory of each stage of sampling on one device is reported or, with `--train`, the plan of
a step of fine-tuning it; only its JSON files are read.
"""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Set before JAX is imported, because with libtpu installed JAX searches for a TPU. Programs are only compiled here,
# unless they are to be measured.
is_measured = "--calibrate" in sys.argv or any(Path("/dev").glob("nvidia[0-9]"))
if "JAX_PLATFORMS" not in os.environ and not is_measured:
    os.environ["JAX_PLATFORMS"] = "cpu"

sys.path.insert(0, str(Path(__file__).parent))

from benchmarks.settings import change_setting, read_setting
from dit_video.core.command_line import ArgumentParser, check_minimum, parse_memory, parse_size
from dit_video.core.errors import UserError, script
from dit_video.core.files import write_json
from dit_video.core.offload import OFFLOADS
from dit_video.distributed.mesh import parse_parallelism
from dit_video.experiment import Experiment
from dit_video.experiment.recipes.finetune import FineTuningOptions, make_finetuning_experiment
from dit_video.families.family import DEFAULT_DTYPE, DTYPES, LoadOptions
from dit_video.planning import (
    CHIPS,
    Calibration,
    Topology,
    find_efficiencies,
    get_calibration_folder,
    read_calibration,
)
from dit_video.planning.efficiencies import calibrate
from dit_video.planning.fit import fit
from dit_video.planning.pipeline import fit_pipeline, plan_pipeline
from dit_video.planning.plan import plan_experiment
from dit_video.planning.suggest import suggest

_EXPERIMENT_OPTIONS = ("parallel", "rows", "clips", "steps", "price", "measure", "suggest", "set")
_SAMPLING_OPTIONS = ("offload", "text_dtype")
_FOLDER_OPTIONS = ("train", "size", "dtype", *_SAMPLING_OPTIONS)


def main() -> None:
    arguments = make_parser().parse_args()
    folder = arguments.calibration or get_calibration_folder()
    if arguments.calibrate:
        print(f"written to {calibrate(report=_print_progress).write(folder)}")
        return
    check_arguments(arguments)
    if arguments.config.is_dir() and arguments.train is None:
        plan_folder(arguments, folder)
        return
    topology, calibration = find_topology(arguments.topology, folder)
    experiment = read_experiment(arguments)
    if arguments.parallel is not None:
        parallel = parse_parallelism(arguments.parallel, experiment.parallel)
        experiment = dataclasses.replace(experiment, parallel=parallel)
    efficiencies = find_efficiencies(topology.chip, calibration)
    options: dict[str, Any] = {"part": arguments.of, "clips": arguments.clips, "efficiencies": efficiencies}
    search: dict[str, Any] = {"tries": arguments.tries, "report": _print_progress}
    costs: dict[str, Any] = {"steps": arguments.steps, "price": arguments.price}
    result: Any
    if arguments.fit is not None:
        result = fit(experiment, topology, parse_memory(arguments.fit), **search, **options)
    elif arguments.suggest:
        result = suggest(experiment, topology, rows=arguments.rows, **search, **costs, **options)
    else:
        result = plan_experiment(experiment, topology, measure=arguments.measure, **costs, **options)
    if arguments.json is not None:
        write_json(arguments.json, result.to_json())
    print(result)


def plan_folder(arguments: Any, calibrations: Path) -> None:
    """Plan the sampling of a pipeline's folder on one device.

    Raises:
      UserError: If options for plans of an experiment are set.
    """
    if arguments.of != "sampler":
        raise UserError(f"--of {arguments.of} is invalid for a folder, whose sampling is planned; use --of sampler")
    _refuse_options(arguments, _EXPERIMENT_OPTIONS, "a folder, for which one request is planned")
    topology, _ = find_topology(arguments.topology, calibrations)
    options = LoadOptions(
        dtype=arguments.dtype or DEFAULT_DTYPE,
        text_dtype=arguments.text_dtype,
        offload="auto" if arguments.offload is None else OFFLOADS[arguments.offload],
    )
    size = None if arguments.size is None else parse_size(arguments.size)
    if arguments.fit is None:
        plan = plan_pipeline(arguments.config, topology, size=size, options=options)
    else:
        plan = fit_pipeline(arguments.config, topology, parse_memory(arguments.fit), size=size, options=options)
    if arguments.json is not None:
        write_json(arguments.json, plan.to_json())
    print(plan)


def _refuse_options(arguments: Any, names: Sequence[str], target: str) -> None:
    """Refuse options that have no effect on a plan.

    Raises:
      UserError: If one of the options is set.
    """
    options = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    if options:
        raise UserError(f"{' '.join(options)} is invalid for {target}. Leave it out")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        help="Config file of an experiment, such as experiments/configs/wan_1_3b_480p.py, or a pipeline's folder.",
    )
    parser.add_argument(
        "--topology",
        help="Hardware to plan for, such as v5e:4x4, v5p:2x2x4, two slices v5p:4x4x8*2, h100:16 or a calibrated cpu:1.",
    )
    parser.add_argument("--of", choices=("denoiser", "autoencoder", "sampler"), default="denoiser")
    parser.add_argument(
        "--parallel",
        help="Devices along each axis, data=..,fsdp=..,tensor=..,context=.., where -1 is the rest, and perhaps "
        "context_attention=ring; by default as in the config.",
    )
    parser.add_argument("--rows", type=int, help="Number of rows of a step's batch; the config's by default.")
    parser.add_argument(
        "--clips", type=int, help="Number of clips in each row; by default as many of the largest as fit."
    )
    parser.add_argument("--steps", type=int, help="Number of steps of the training; the config's by default.")
    parser.add_argument("--price", type=float, help="Price of a chip-hour in dollars; the list price by default.")
    parser.add_argument(
        "--measure", action="store_true", help="Run a step and report the devices' memory, if they are present."
    )
    parser.add_argument("--suggest", action="store_true", help="Search mesh, rows (unless --rows is set) and remat.")
    parser.add_argument(
        "--train", choices=("lora", "full"), help="Folders: plan the fine-tuning of these weights instead of sampling."
    )
    parser.add_argument("--size", help="Folders: size of the clip, such as 81x480x832; the pipeline's own by default.")
    parser.add_argument(
        "--offload", choices=tuple(OFFLOADS), help="Folders: weights in host memory; as the memory asks."
    )
    parser.add_argument("--dtype", choices=DTYPES, help="Folders: dtype of matrix products; bfloat16 by default.")
    parser.add_argument("--text-dtype", choices=DTYPES, help="Folders: dtype of the text encoder; the same by default.")
    parser.add_argument(
        "--fit",
        metavar="SIZE",
        help="Search the options that fit into a memory such as 24GiB; of a folder, the fastest --offload.",
    )
    parser.add_argument("--tries", type=int, default=4, help="Number of candidates that a search compiles.")
    parser.add_argument("--calibrate", action="store_true", help="Measure this machine's devices for later plans.")
    parser.add_argument(
        "--calibration", type=Path, metavar="FOLDER", help="Folder of calibrations; by default in the user's cache."
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="Change a field of the config; repeatable."
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the whole plan to.")
    return parser


def check_arguments(arguments: Any) -> None:
    """Check the options of a plan.

    Raises:
      UserError: If an option is missing or out of range, or if two exclude each other.
    """
    for name, value in (("CONFIG", arguments.config), ("--topology", arguments.topology)):
        if value is None:
            raise UserError(
                f"{name} is missing: only --calibrate does without. Use tools/plan.py CONFIG --topology v5e:4x4"
            )
    numbers = {name: getattr(arguments, name) for name in ("steps", "tries", "rows", "clips")}
    check_minimum(1, **numbers)
    check_minimum(0, price=arguments.price)
    if arguments.suggest and arguments.parallel is not None:
        raise UserError(
            "--suggest and --parallel exclude each other, because --suggest searches for a mesh; drop one of them"
        )
    if arguments.suggest and arguments.fit is not None:
        raise UserError("--suggest and --fit exclude each other, because both search; drop one of them")


def find_topology(text: str, folder: Path) -> tuple[Topology, Calibration | None]:
    """Return a topology, and the calibration of its chip in a folder; None if there is none.

    Raises:
      UserError: If the text is not a topology, or if a file in the folder is not a calibration.
    """
    name = text.lower().partition(":")[0]
    calibration = read_calibration(folder, "v7x" if name == "tpu7x" else name) if name.isalnum() else None
    if name == "cpu" and calibration is None:
        rule = f"a CPU is planned for as it was measured, and {folder} has no measurement"
        raise UserError(f"--topology {text} is invalid: {rule}. Use --calibrate first")
    return Topology.parse(text, CHIPS if calibration is None else {**CHIPS, name: calibration.chip}), calibration


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_experiment(arguments: Any) -> Experiment:
    """Return the experiment of a config file, or of the fine-tuning of a folder, with some of its fields changed.

    Raises:
      MissingError: If the file does not exist, or the folder lacks parts.
      UserError: If the file defines no experiment, if a field does not exist or rejects its value, or if the model of
        the folder cannot be fine-tuned.
    """
    if arguments.config.is_dir():
        _refuse_options(arguments, _SAMPLING_OPTIONS, "a training")
        size = None if arguments.size is None else parse_size(arguments.size)
        options = FineTuningOptions(train=arguments.train, dtype=arguments.dtype)
        if size is not None:
            options = dataclasses.replace(options, max_frames=size.t, max_pixels=size.h * size.w)
        experiment = make_finetuning_experiment(arguments.config, options, has_weights=False)
    else:
        _refuse_options(arguments, _FOLDER_OPTIONS, "a config, whose fields are set by --set")
        experiment = read_setting(arguments.config)
        if not isinstance(experiment, Experiment):
            raise UserError(f"{arguments.config} defines no EXPERIMENT; assign it an Experiment(...)")
    rows = [] if arguments.rows is None else [f"denoiser.batch={arguments.rows}"]
    return change_setting(experiment, [*arguments.set, *rows])


if __name__ == "__main__":
    script(main, is_resumable=False)()
