"""Options of an experiment that lower the memory of a device, and their values."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

from dit_video.distributed import AXES
from dit_video.experiment import AllWeights, Experiment, LoraAdapters
from dit_video.nn import Remat
from dit_video.planning.steps import Part
from dit_video.planning.suggest import SKIPPED_REMATS, list_meshes
from dit_video.training.optim.ema import EmaConfig


@dataclass(frozen=True)
class Setting:
    """A value of an option, other than the experiment's."""

    option: str
    """Path of the field in the config, or name of an option of `tools/plan.py` such as `--mesh`."""
    value: str
    apply: Callable[[Experiment], Experiment] = field(compare=False)
    """Function that returns the experiment with this value."""
    keeps_result: bool = field(default=True, compare=False)
    """The training, or the sample, is the same up to rounding."""
    reshapes_step: bool = field(default=False, compare=False)
    """The state, or the counted costs, have to be computed again."""

    def __str__(self) -> str:
        return f"{self.option} {self.value}" if self.option.startswith("--") else f"--set {self.option}={self.value}"


def list_settings(experiment: Experiment, part: Part, devices: int) -> dict[str, list[Setting]]:
    """Return the settings of every option that the experiment has, by option; options without any are left out.

    Args:
      experiment: the experiment.
      part: the denoiser, or its sampler.
      devices: number of devices of the mesh.
    """
    settings = [*_list_meshes(experiment, devices), *_list_rows(experiment), *_list_dtypes(experiment)]
    settings += _list_sampling(experiment) if part == "sampler" else _list_training(experiment)
    return {option: [each for each in settings if each.option == option] for option in {s.option: 0 for s in settings}}


def _list_meshes(experiment: Experiment, devices: int) -> Iterator[Setting]:
    for mesh in list_meshes(experiment, devices):
        value = ",".join(f"{name}={getattr(mesh, name)}" for name in AXES if getattr(mesh, name) > 1) or "data=1"
        if mesh != experiment.mesh:
            yield Setting("--mesh", value, functools.partial(dataclasses.replace, mesh=mesh))


def _list_rows(experiment: Experiment) -> Iterator[Setting]:
    rows = experiment.denoiser.batch
    while (rows := rows // 2) >= 1:
        yield Setting("--rows", str(rows), _replace_denoiser(batch=rows), keeps_result=False)


def _list_dtypes(experiment: Experiment) -> Iterator[Setting]:
    if experiment.denoiser.backbone.dtype == "float32":
        yield Setting(
            "denoiser.backbone.dtype",
            "bfloat16",
            functools.partial(Experiment.replace_backbone, dtype="bfloat16"),
            keeps_result=False,
            reshapes_step=True,
        )


def _list_sampling(experiment: Experiment) -> Iterator[Setting]:
    if experiment.sampling.full_guidance.branch_count > 1 and experiment.sampling.branch_evaluation == "together":

        def apart(old: Experiment) -> Experiment:
            return dataclasses.replace(old, sampling=dataclasses.replace(old.sampling, branch_evaluation="apart"))

        yield Setting("sampling.branch_evaluation", "apart", apart, reshapes_step=True)


def _list_training(experiment: Experiment) -> Iterator[Setting]:
    denoiser = experiment.denoiser
    for remat in get_args(Remat):
        if remat != denoiser.backbone.remat and remat not in SKIPPED_REMATS:
            yield Setting("denoiser.backbone.remat", remat, functools.partial(Experiment.replace_backbone, remat=remat))
    count = denoiser.accumulation_steps
    while (count := count * 2) <= denoiser.batch:
        if denoiser.batch % count == 0:
            yield Setting("denoiser.accumulation_steps", str(count), _replace_denoiser(accumulation_steps=count))
    changes: dict[str, Any] = {"keeps_result": False, "reshapes_step": True}
    if denoiser.optimizer.kind != "adafactor":
        optimizer = dataclasses.replace(denoiser.optimizer, kind="adafactor")
        yield Setting("denoiser.optimizer.kind", "adafactor", _replace_denoiser(optimizer=optimizer), **changes)
    if denoiser.averages.decays or denoiser.averages.sigmas:
        yield Setting("denoiser.averages", "EmaConfig()", _replace_denoiser(averages=EmaConfig()), **changes)
    if isinstance(denoiser.train, AllWeights) and denoiser.train.init_from is not None:
        adapters = LoraAdapters(init_from=denoiser.train.init_from, expert=denoiser.train.expert)
        yield Setting("denoiser.train", "LoraAdapters(...)", _replace_denoiser(train=adapters), **changes)


def _replace_denoiser(**changes: Any) -> Callable[[Experiment], Experiment]:
    """Return a function that replaces fields of the denoiser's training."""

    def apply(experiment: Experiment) -> Experiment:
        return dataclasses.replace(experiment, denoiser=dataclasses.replace(experiment.denoiser, **changes))

    return apply
