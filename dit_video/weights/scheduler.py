"""Sampling of a diffusers folder: its `scheduler_config.json` as solver, process, time schedule and prediction."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.diffusion import (
    X0,
    BetaSchedule,
    CosineBetas,
    Ddim,
    Ddpm,
    DiscreteSchedule,
    DpmFlowSchedule,
    DpmMultistep,
    DpmSinglestep,
    Epsilon,
    Euler,
    FlowMatchSchedule,
    Heun,
    Lcm,
    LcmSchedule,
    LearnedVariance,
    LinearBetas,
    Prediction,
    Process,
    RectifiedFlow,
    ScaledLinearBetas,
    Solver,
    TimeSchedule,
    UniPc,
    UniPcFlowSchedule,
    V,
    VariancePreservingProcess,
    Velocity,
)

CONFIG_FILE = "scheduler_config.json"


class LoadedScheduler(NamedTuple):
    """The sampling settings of a model."""

    solver: Solver
    process: Process
    """Diffusion process; for a flow including the shift."""
    time_schedule: TimeSchedule
    prediction: Prediction = Velocity()


def load_scheduler(folder: str | os.PathLike) -> LoadedScheduler:
    """Read the sampling settings of a folder with a `scheduler_config.json`.

    The steps, their times and the model times are those of diffusers' scheduler, with one exception: if DDIM's trailing
    steps do not divide the training steps, each step starts where the previous one ended, which diffusers' may miss by
    one.

    Raises:
      MissingError: the file does not exist.
      UserError: the scheduler or one of its settings is not supported.
    """
    path = Path(folder) / CONFIG_FILE
    document = read_json(path)
    kind = document.get("_class_name") if isinstance(document, dict) else None
    if kind not in _SCHEDULERS:
        raise UserError(f"{path} has a scheduler of class {kind}. Supported classes are {', '.join(_SCHEDULERS)}")
    fields, make = _SCHEDULERS[kind]
    settings = {name: value for name, value in document.items() if not name.startswith("_")}
    if unknown := sorted(settings.keys() - fields.keys()):
        raise UserError(f"{path} sets {', '.join(unknown)}. Supported settings of {kind} are {', '.join(fields)}")
    if settings.get("use_flow_sigmas"):
        fields = fields | _FLOW_OVERRIDES
    values = {name: settings.get(name, field.default) for name, field in fields.items()}
    for name, value in values.items():
        if fields[name].supported and value not in fields[name].supported:
            supported = " or ".join(repr(option) for option in fields[name].supported)
            raise UserError(f"{path} sets {name}={value!r}. Supported: {supported}")
        if fields[name].is_positive and not (isinstance(value, int | float) and value > 0):
            raise UserError(f"{path} sets {name}={value!r}. Use a positive number")
    return make(values)


class _Setting(NamedTuple):
    """A setting of a scheduler, with its supported values."""

    default: Any
    """Default of diffusers."""
    supported: tuple[Any, ...] = ()
    """Supported values; if empty, all values are supported, or the setting has no effect."""
    is_positive: bool = False
    """The value must be a positive number."""


_OFF = _Setting(False, (False, None))
_NONE = _Setting(None, (None,))
_NO_EFFECT = _Setting(None)
_BOOLEAN = (True, False)


def _make_betas(settings: Mapping[str, Any]) -> BetaSchedule:
    if settings["beta_schedule"] == "squaredcos_cap_v2":
        return CosineBetas()
    kind = LinearBetas if settings["beta_schedule"] == "linear" else ScaledLinearBetas
    return kind(beta_start=float(settings["beta_start"]), beta_end=float(settings["beta_end"]))


def _make_process(settings: Mapping[str, Any]) -> Process:
    if settings.get("use_flow_sigmas"):
        return RectifiedFlow(shift=float(settings["flow_shift"]))
    return VariancePreservingProcess(betas=_make_betas(settings), steps=int(settings["num_train_timesteps"]))


def _make_schedule(settings: Mapping[str, Any], solver: Solver, time_schedule: TimeSchedule) -> LoadedScheduler:
    return LoadedScheduler(solver, _make_process(settings), time_schedule, _PREDICTIONS[settings["prediction_type"]])


def _make_step_schedule(settings: Mapping[str, Any], **others: Any) -> DiscreteSchedule:
    return DiscreteSchedule(
        spacing=settings.get("timestep_spacing", "linspace"),
        steps_offset=int(settings.get("steps_offset", 0)),
        end="data" if settings.get("final_sigmas_type", "zero") == "zero" else "first step",
        ratio_spacing=_get_sigma_spacing(settings),
        **others,
    )


def _get_sigma_spacing(settings: Mapping[str, Any]) -> Literal["spaced", "karras", "exponential"]:
    if settings.get("use_karras_sigmas"):
        return "karras"
    return "exponential" if settings.get("use_exponential_sigmas") else "spaced"


def _make_ddim(settings: Mapping[str, Any]) -> LoadedScheduler:
    end = "zero" if settings["set_alpha_to_one"] else "sigma_min"
    schedule = _make_step_schedule({**settings, "final_sigmas_type": end}, step_rounding="nearest")
    return _make_schedule(settings, Ddim(), schedule)


def _make_ddpm(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = Ddpm(variance="large" if settings["variance_type"] == "fixed_large" else "small")
    schedule = _make_schedule(settings, solver, _make_step_schedule(settings, step_rounding="nearest"))
    if settings["variance_type"] != "learned_range":
        return schedule
    prediction = LearnedVariance(prediction=schedule.prediction, steps=settings["num_train_timesteps"])
    return schedule._replace(prediction=prediction)


def _make_one_step(solver: Solver) -> Callable[[Mapping[str, Any]], LoadedScheduler]:
    """Return a function from settings to the schedule of a solver without settings of its own."""
    return lambda settings: _make_schedule(settings, solver, _make_step_schedule(settings))


def _make_lcm(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = Lcm(scaling=float(settings["timestep_scaling"]) * settings["num_train_timesteps"])
    return _make_schedule(settings, solver, LcmSchedule(distillation_steps=int(settings["original_inference_steps"])))


def _make_high_order(
    settings: Mapping[str, Any],
    solver: Solver,
    flow_schedule: TimeSchedule,
    *,
    floored: tuple[str, ...] = ("exponential",),
) -> LoadedScheduler:
    """Return the schedule of a high-order solver.

    The model time is rounded down to a step for the sigma spacings in `floored`, to the nearest step for others.
    """
    if settings["use_flow_sigmas"]:
        return _make_schedule(settings, solver, flow_schedule)
    rounding = "below" if _get_sigma_spacing(settings) in floored else "nearest"
    grid = _make_step_schedule(settings, step_rounding=rounding, has_extra_step=True)
    return _make_schedule(settings, solver, grid)


def _make_dpm_multistep(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = DpmMultistep(
        order=settings["solver_order"],
        kind="heun" if settings["solver_type"] == "heun" else "midpoint",
        eta=1.0 if settings["algorithm_type"] == "sde-dpmsolver++" else 0.0,
        lower_order_final=settings["lower_order_final"],
    )
    floored = ("karras", "exponential") if settings["beta_schedule"] == "squaredcos_cap_v2" else ("exponential",)
    grid = DpmFlowSchedule(training_steps=settings["num_train_timesteps"])
    return _make_high_order(settings, solver, grid, floored=floored)


def _make_dpm_singlestep(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = DpmSinglestep(
        kind="heun" if settings["solver_type"] == "heun" else "midpoint",
        lower_order_final=settings["lower_order_final"],
    )
    return _make_high_order(settings, solver, DpmFlowSchedule(training_steps=settings["num_train_timesteps"]))


def _make_unipc(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = UniPc(
        order=settings["solver_order"],
        # diffusers maps the names of three older solvers to `bh2`.
        kind="bh1" if settings["solver_type"] == "bh1" else "bh2",
        lower_order_final=settings["lower_order_final"],
        uncorrected_steps=tuple(settings["disable_corrector"]),
    )
    return _make_high_order(settings, solver, UniPcFlowSchedule(training_steps=settings["num_train_timesteps"]))


def _make_flow_match(settings: Mapping[str, Any]) -> LoadedScheduler:
    grid = FlowMatchSchedule(training_steps=settings["num_train_timesteps"])
    return LoadedScheduler(Euler(), RectifiedFlow(shift=float(settings["shift"])), grid)


_PREDICTIONS = {"epsilon": Epsilon(), "sample": X0(), "v_prediction": V(), "flow_prediction": Velocity()}


def _make_ddpm_settings(
    *, scaled: bool = False, schedule: str = "linear", spacing: str = "leading"
) -> dict[str, _Setting]:
    """Return the settings that all schedulers of DDPM's process share, with the defaults that differ among them."""
    first, last = (0.00085, 0.012) if scaled else (0.0001, 0.02)
    return {
        "num_train_timesteps": _Setting(1000, is_positive=True),
        "beta_start": _Setting(first, is_positive=True),
        "beta_end": _Setting(last, is_positive=True),
        "beta_schedule": _Setting(schedule, ("linear", "scaled_linear", "squaredcos_cap_v2")),
        "trained_betas": _NONE,
        "prediction_type": _Setting("epsilon", ("epsilon", "sample", "v_prediction")),
        "timestep_spacing": _Setting(spacing, ("leading", "trailing", "linspace")),
        "steps_offset": _Setting(0),
        "rescale_betas_zero_snr": _OFF,
        # Left over in folders that were converted from another scheduler.
        **dict.fromkeys(("clip_sample", "set_alpha_to_one", "skip_prk_steps"), _NO_EFFECT),
    }


_CLIPPING = {
    "clip_sample": _Setting(True, (False,)),
    **dict.fromkeys(("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"), _NO_EFFECT),
    "thresholding": _OFF,
}
_KARRAS = {
    "use_karras_sigmas": _Setting(False, (*_BOOLEAN, None)),
    "use_exponential_sigmas": _Setting(False, (*_BOOLEAN, None)),
    "use_beta_sigmas": _OFF,
}
_SIGMAS = {
    **_make_ddpm_settings(spacing="linspace"),
    **_KARRAS,
    "final_sigmas_type": _Setting("zero", ("zero", "sigma_min")),
}
_FLOW_SIGMAS = {
    "use_flow_sigmas": _Setting(False, _BOOLEAN),
    "flow_shift": _Setting(1.0, is_positive=True),
    "use_dynamic_shifting": _OFF,
    "thresholding": _OFF,
    **dict.fromkeys(("time_shift_type", "dynamic_thresholding_ratio", "sample_max_value"), _NO_EFFECT),
}
_FLOW_OVERRIDES = {
    "prediction_type": _Setting("epsilon", ("flow_prediction",)),
    "use_karras_sigmas": _OFF,
    "use_exponential_sigmas": _OFF,
    "final_sigmas_type": _Setting("zero", ("zero",)),
    **dict.fromkeys(("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"), _NO_EFFECT),
    **dict.fromkeys(("timestep_spacing", "steps_offset", "sigma_min", "sigma_max"), _NO_EFFECT),
}
"""Replacements of settings if flow sigmas are used."""
_DDIM = {
    **_make_ddpm_settings(),
    **_CLIPPING,
    "timestep_spacing": _Setting("leading", ("leading", "trailing")),
    "set_alpha_to_one": _Setting(True, _BOOLEAN),
}
_DDPM = {
    **_make_ddpm_settings(),
    **_CLIPPING,
    "variance_type": _Setting("fixed_small", ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")),
}
_EULER = {
    **_SIGMAS,
    "interpolation_type": _Setting("linear", ("linear",)),
    "timestep_type": _Setting("discrete", ("discrete",)),
    **dict.fromkeys(("sigma_min", "sigma_max"), _NONE),
}
_EULER_ANCESTRAL = _make_ddpm_settings(spacing="linspace")
_HEUN = {
    **_make_ddpm_settings(scaled=True, spacing="linspace"),
    **_KARRAS,
    "clip_sample": _Setting(False, (False,)),
    "clip_sample_range": _NO_EFFECT,
}
_LCM = {
    **_make_ddpm_settings(scaled=True, schedule="scaled_linear"),
    **_CLIPPING,
    "clip_sample": _Setting(False, (False,)),
    "original_inference_steps": _Setting(50, is_positive=True),
    "timestep_scaling": _Setting(10.0, is_positive=True),
}
_DPM = {
    **_SIGMAS,
    **_FLOW_SIGMAS,
    "solver_type": _Setting("midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2")),
    "lambda_min_clipped": _Setting(-float("inf"), (-float("inf"),)),
    "variance_type": _NONE,
}
_DPM_MULTISTEP = {
    **_DPM,
    "solver_order": _Setting(2, (1, 2)),
    "algorithm_type": _Setting("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++")),
    "lower_order_final": _Setting(True, _BOOLEAN),
    "euler_at_final": _OFF,
    "use_lu_lambdas": _OFF,
}
_DPM_SINGLESTEP = {
    **{name: field for name, field in _DPM.items() if name not in ("timestep_spacing", "steps_offset")},
    "solver_order": _Setting(2, (2,)),
    "algorithm_type": _Setting("dpmsolver++", ("dpmsolver++",)),
    "lower_order_final": _Setting(False, _BOOLEAN),
}
_UNIPC = {
    **_SIGMAS,
    **_FLOW_SIGMAS,
    "solver_order": _Setting(2, (1, 2, 3)),
    "solver_type": _Setting("bh2", ("bh1", "bh2", "midpoint", "heun", "logrho")),
    "predict_x0": _Setting(True, (True,)),
    "lower_order_final": _Setting(True, _BOOLEAN),
    "disable_corrector": _Setting(()),
    **dict.fromkeys(("solver_p", "shift_terminal", "sigma_min", "sigma_max"), _NONE),
}
_FLOW_MATCH = {
    "num_train_timesteps": _Setting(1000, is_positive=True),
    "shift": _Setting(1.0, is_positive=True),
    "shift_terminal": _NONE,
    **dict.fromkeys(("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"), _OFF),
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), _OFF),
    **dict.fromkeys(("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"), _NO_EFFECT),
    "time_shift_type": _NO_EFFECT,
}
_SCHEDULERS: dict[str, tuple[dict[str, _Setting], Callable[[Mapping[str, Any]], LoadedScheduler]]] = {
    "UniPCMultistepScheduler": (_UNIPC, _make_unipc),
    "FlowMatchEulerDiscreteScheduler": (_FLOW_MATCH, _make_flow_match),
    "DDIMScheduler": (_DDIM, _make_ddim),
    "DDPMScheduler": (_DDPM, _make_ddpm),
    "EulerDiscreteScheduler": (_EULER, _make_one_step(Euler())),
    "EulerAncestralDiscreteScheduler": (_EULER_ANCESTRAL, _make_one_step(Ddim(eta=1.0))),
    "HeunDiscreteScheduler": (_HEUN, _make_one_step(Heun())),
    "DPMSolverMultistepScheduler": (_DPM_MULTISTEP, _make_dpm_multistep),
    "DPMSolverSinglestepScheduler": (_DPM_SINGLESTEP, _make_dpm_singlestep),
    "LCMScheduler": (_LCM, _make_lcm),
}
