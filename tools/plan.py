"""What a run will need, before it is paid for: its own step, compiled for hardware that need not be there.

    python tools/plan.py experiments/configs/wan_1_3b_480p.py --topology v5p:2x2x4
    python tools/plan.py experiments/configs/wan_14b_480p.py --topology v6e:16x16 --mesh fsdp=64,context=4 --rows 64
    python tools/plan.py experiments/configs/wan_14b_480p.py --topology v5p:4x4x8 --suggest --json plan.json
    python tools/plan.py experiments/configs/clips.py --topology h100:8          # counted, unless there are eight H100
    python tools/plan.py experiments/configs/wan_1_3b_480p.py --topology v5e:4x4 --of sampler

Says whether it fits, bytes on each device (parameters, optimizer, EMA, activations, temporary), operations of the model
and those executed, bytes that each kind of collective moves over each axis of the mesh, what the roofline allows, and
chip-hours and price. TPUs need `libtpu` (pip install libtpu) and no TPU; for GPUs that are not here everything is
counted and marked `analytic`. `--suggest` searches meshes, rows and recomputation. Any scalar of the config can be
set with --set: `--set denoiser.dit.layers=20`.
"""

import argparse
import ast
import os
import sys
from pathlib import Path

# Before JAX is imported, which would look for a TPU once libtpu is installed: programs are made here, none is run.
if "JAX_PLATFORMS" not in os.environ and not any(Path("/dev").glob("nvidia[0-9]")):
    os.environ["JAX_PLATFORMS"] = "cpu"

sys.path.insert(0, str(Path(__file__).parent))

from benchmarks.setting import changed, read_setting
from dit_video.core.errors import UserError, script
from dit_video.core.files import write_json
from dit_video.distributed import AXES, MeshConfig
from dit_video.distributed.planner import Topology
from dit_video.experiment import Experiment
from dit_video.planning import plan_experiment, suggest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="an experiment, such as experiments/configs/wan_1_3b_480p.py")
    parser.add_argument("--topology", required=True, help="hardware: v5e:4x4, v5p:2x2x4, h100:16")
    parser.add_argument("--of", choices=("denoiser", "autoencoder", "sampler"), default="denoiser")
    parser.add_argument(
        "--mesh", help="data=..,fsdp=..,tensor=..,context=.. instead of the config's; -1 is what is left"
    )
    parser.add_argument("--rows", type=int, help="of a step's batch, instead of the config's")
    parser.add_argument("--clips", type=int, help="in each row; by default as many of the largest as fit")
    parser.add_argument("--steps", type=int, help="to be paid for; the config's by default")
    parser.add_argument("--price", type=float, help="of a chip for an hour, in dollars, instead of the list's")
    parser.add_argument(
        "--measure", action="store_true", help="run a step and say what devices held, where they are here"
    )
    parser.add_argument("--suggest", action="store_true", help="search mesh, rows (unless given) and remat")
    parser.add_argument("--tries", type=int, default=4, help="how many of them are compiled")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="another value in the config")
    parser.add_argument("--json", type=Path, help="a file for the whole plan")
    given = parser.parse_args()
    for name in ("steps", "tries", "rows"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    topology = Topology.parse(given.topology)
    mesh = None if given.mesh is None else read_mesh(given.mesh)
    experiment = read_experiment(given.config, given.set, rows=given.rows)
    asked = {"part": given.of, "clips": given.clips, "steps": given.steps, "price": given.price}
    if given.suggest:
        if mesh is not None:
            raise UserError("--suggest searches for a mesh: leave out --mesh, or --suggest")
        plan = suggest(
            experiment,
            topology,
            rows=given.rows,
            tries=given.tries,
            say=lambda line: print(line, file=sys.stderr, flush=True),
            **asked,
        )
    else:
        plan = plan_experiment(experiment, topology, mesh=mesh, measure=given.measure, **asked)
    if given.json is not None:
        write_json(given.json, plan.to_json())
    print(plan)


def read_experiment(path: Path, changes: list[str], *, rows: int | None) -> Experiment:
    """The experiment of a file, with other values in some fields.

    Raises:
      MissingError: no such file.
      UserError: a file without an experiment, a field that there is not, or a value that it does not take.
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
        experiment = changed(experiment, name, value)
    return experiment


def read_mesh(text: str) -> MeshConfig:
    """`fsdp=8,context=4`; what is not named is 1, but for `data`, which is what is left.

    Raises:
      UserError: an axis that there is not, or what is no number.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not size.lstrip("-").isdecimal():
            raise UserError(
                f"{part!r} is no axis of a mesh with its size; write {','.join(f'{axis}=1' for axis in AXES)}"
            )
        sizes[name] = int(size)
    if "data" not in sizes and -1 in sizes.values():
        sizes["data"] = 1
    return MeshConfig(**sizes)


if __name__ == "__main__":
    script(main)()
