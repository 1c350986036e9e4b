"""Plan a training step without its hardware: compile it and report memory, FLOPs, communication, time and price.

    python tools/plan.py experiments/configs/wan_1_3b_480p.py --topology v5p:2x2x4
    python tools/plan.py experiments/configs/wan_14b_480p.py --topology v6e:16x16 --mesh fsdp=64,context=4 --rows 64
    python tools/plan.py experiments/configs/wan_14b_480p.py --topology v5p:4x4x8 --suggest --json plan.json
    python tools/plan.py experiments/configs/clips.py --topology h100:8          # analytic, unless 8 H100 are present
    python tools/plan.py experiments/configs/wan_1_3b_480p.py --topology v5e:4x4 --of sampler

The report says whether the step fits, the bytes on each device (parameters, optimizer, EMA, activations, temporary
buffers), the model's and the executed FLOPs, the bytes that each kind of collective moves along each mesh axis, the
roofline's time, and chip-hours and price. Plans for TPUs need `libtpu` (pip install libtpu) but no TPU. For GPUs that
are not present, everything is computed analytically and marked `analytic`. `--suggest` searches meshes, rows and
rematerialization. `--set` changes any scalar of the config: `--set denoiser.backbone.layers=20`.
"""

from dit_video.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

import ast
import os
import sys
from pathlib import Path

# Set before JAX is imported, because with libtpu installed JAX searches for a TPU. Programs are only compiled here.
if "JAX_PLATFORMS" not in os.environ and not any(Path("/dev").glob("nvidia[0-9]")):
    os.environ["JAX_PLATFORMS"] = "cpu"

sys.path.insert(0, str(Path(__file__).parent))

from benchmarks.settings import read_setting, replace_field
from dit_video.core.command_line import ArgumentParser, check_minimum
from dit_video.core.errors import UserError, script
from dit_video.core.files import write_json
from dit_video.distributed.mesh import parse_mesh
from dit_video.distributed.planner import Topology
from dit_video.experiment import Experiment
from dit_video.planning import plan_experiment, suggest


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "config", type=Path, help="Config file of an experiment, such as experiments/configs/wan_1_3b_480p.py."
    )
    parser.add_argument(
        "--topology", required=True, help="Hardware to plan for, such as v5e:4x4, v5p:2x2x4 or h100:16."
    )
    parser.add_argument("--of", choices=("denoiser", "autoencoder", "sampler"), default="denoiser")
    parser.add_argument(
        "--mesh", help="Mesh, data=..,fsdp=..,tensor=..,context=.., where -1 is the rest; the config's by default."
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
    parser.add_argument("--tries", type=int, default=4, help="Number of candidates that --suggest compiles.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="Change a field of the config; repeatable."
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the whole plan to.")
    arguments = parser.parse_args()
    check_minimum(1, steps=arguments.steps, tries=arguments.tries, rows=arguments.rows, clips=arguments.clips)
    check_minimum(0, price=arguments.price)
    topology = Topology.parse(arguments.topology)
    mesh = None if arguments.mesh is None else parse_mesh(arguments.mesh)
    experiment = read_experiment(arguments.config, arguments.set, rows=arguments.rows)
    options = {"part": arguments.of, "clips": arguments.clips, "steps": arguments.steps, "price": arguments.price}
    if arguments.suggest:
        if mesh is not None:
            raise UserError(
                "--suggest and --mesh exclude each other, because --suggest searches for a mesh; drop one of them"
            )
        plan = suggest(
            experiment,
            topology,
            rows=arguments.rows,
            tries=arguments.tries,
            report=lambda line: print(line, file=sys.stderr, flush=True),
            **options,
        )
    else:
        plan = plan_experiment(experiment, topology, mesh=mesh, measure=arguments.measure, **options)
    if arguments.json is not None:
        write_json(arguments.json, plan.to_json())
    print(plan)


def read_experiment(path: Path, changes: list[str], *, rows: int | None) -> Experiment:
    """Read the experiment of a config file and change some of its fields.

    Raises:
      MissingError: if the file does not exist.
      UserError: if the file defines no experiment, or if a field does not exist or rejects its value.
    """
    experiment = read_setting(path)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} defines no EXPERIMENT; assign it an Experiment(...)")
    for change in [*changes, *([] if rows is None else [f"denoiser.batch={rows}"])]:
        name, _, text = change.partition("=")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        experiment = replace_field(experiment, name, value)
    return experiment


if __name__ == "__main__":
    script(main, is_resumable=False)()
