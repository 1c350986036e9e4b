"""The sampling that a diffusers folder asks for: its `scheduler_config.json` as a solver, a shift and a time grid."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.diffusion import Euler, FlowMatchGrid, RectifiedFlow, Sampler, TimeGrid, UniPc, UniPcGrid
from dit_video.errors import UserError
from dit_video.files import read_json

CONFIG = "scheduler_config.json"


class Schedule(NamedTuple):
    """How a model is sampled."""

    solver: Sampler
    process: RectifiedFlow
    """with the shift"""
    grid: TimeGrid


def load_scheduler(folder: str | os.PathLike) -> Schedule:
    """The sampling of a folder that holds a `scheduler_config.json`.

    Steps, their times and what the model is told of them are the scheduler's own (`UniPCMultistepScheduler` with flow
    sigmas, `FlowMatchEulerDiscreteScheduler`).

    Raises:
      MissingError: no such file.
      UserError: another scheduler, or settings of it that are not known here.
    """
    path = Path(folder) / CONFIG
    document = read_json(path)
    kind = document.get("_class_name") if isinstance(document, dict) else None
    if kind not in _KINDS:
        raise UserError(f"{path} is of a scheduler {kind}; known here: {', '.join(_KINDS)}")
    fields, make = _KINDS[kind]
    settings = {name: value for name, value in document.items() if not name.startswith("_")}
    if unknown := sorted(settings.keys() - fields.keys()):
        raise UserError(f"{path} sets {', '.join(unknown)}; of {kind} these are known here: {', '.join(fields)}")
    given = {name: settings.get(name, field.default) for name, field in fields.items()}
    for name, value in given.items():
        if fields[name].known and value not in fields[name].known:
            known = " or ".join(repr(option) for option in fields[name].known)
            raise UserError(f"{path} sets {name}={value!r}; known here is {known}")
        if fields[name].number and not (isinstance(value, int | float) and value > 0):
            raise UserError(f"{path} sets {name}={value!r}; it is a positive number")
    return make(given)


class _Field(NamedTuple):
    """A setting of a scheduler."""

    default: Any
    """diffusers' own"""
    known: tuple[Any, ...] = ()
    """values that are followed here; without any all are, or the setting has no effect on a flow"""
    number: bool = False
    """whether it must be a positive number"""


_OFF = _Field(False, (False, None))
_NONE = _Field(None, (None,))
_NO_EFFECT = _Field(None)


def _unipc(given: Mapping[str, Any]) -> Schedule:
    solver = UniPc(
        order=given["solver_order"],
        kind="bh1" if given["solver_type"] == "bh1" else "bh2",  # three names of older solvers mean `bh2` there
        lower_order_final=given["lower_order_final"],
        uncorrected=tuple(given["disable_corrector"]),
    )
    return Schedule(
        solver, RectifiedFlow(shift=float(given["flow_shift"])), UniPcGrid(training_steps=given["num_train_timesteps"])
    )


def _flow_match(given: Mapping[str, Any]) -> Schedule:
    grid = FlowMatchGrid(training_steps=given["num_train_timesteps"])
    return Schedule(Euler(), RectifiedFlow(shift=float(given["shift"])), grid)


_UNIPC = {
    "num_train_timesteps": _Field(1000, number=True),
    "solver_order": _Field(2, (1, 2, 3)),
    "solver_type": _Field("bh2", ("bh1", "bh2", "midpoint", "heun", "logrho")),
    "prediction_type": _Field("epsilon", ("flow_prediction",)),
    "use_flow_sigmas": _Field(False, (True,)),
    "flow_shift": _Field(1.0, number=True),
    "predict_x0": _Field(True, (True,)),
    "lower_order_final": _Field(True, (True, False)),
    "disable_corrector": _Field(()),
    "final_sigmas_type": _Field("zero", ("zero",)),
    "thresholding": _OFF,
    "solver_p": _NONE,
    "use_karras_sigmas": _OFF,
    "use_exponential_sigmas": _OFF,
    "use_beta_sigmas": _OFF,
    "use_dynamic_shifting": _OFF,
    "shift_terminal": _NONE,
    **dict.fromkeys(
        (
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "dynamic_thresholding_ratio",
            "sample_max_value",
            "timestep_spacing",
            "steps_offset",
            "rescale_betas_zero_snr",
            "time_shift_type",
            "sigma_min",
            "sigma_max",
        ),
        _NO_EFFECT,
    ),
}
_FLOW_MATCH = {
    "num_train_timesteps": _Field(1000, number=True),
    "shift": _Field(1.0, number=True),
    "use_dynamic_shifting": _OFF,
    "shift_terminal": _NONE,
    "invert_sigmas": _OFF,
    "use_karras_sigmas": _OFF,
    "use_exponential_sigmas": _OFF,
    "use_beta_sigmas": _OFF,
    "stochastic_sampling": _OFF,
    **dict.fromkeys(
        ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"), _NO_EFFECT
    ),
}
_KINDS: dict[str, tuple[dict[str, _Field], Callable[[Mapping[str, Any]], Schedule]]] = {
    "UniPCMultistepScheduler": (_UNIPC, _unipc),
    "FlowMatchEulerDiscreteScheduler": (_FLOW_MATCH, _flow_match),
}
