"""Sampling of a diffusers folder: its `scheduler_config.json` as solver, process, time schedule and prediction."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.diffusion import (
    X0,
    Betas,
    Cosine,
    Ddim,
    Ddpm,
    DpmFlowGrid,
    DpmMultistep,
    DpmSinglestep,
    Epsilon,
    Euler,
    FlowMatchGrid,
    Heun,
    Lcm,
    LcmGrid,
    LearnedVariance,
    Linear,
    Prediction,
    Process,
    RectifiedFlow,
    Sampler,
    ScaledLinear,
    StepGrid,
    TimeGrid,
    UniPc,
    UniPcGrid,
    V,
    VariancePreserving,
    Velocity,
)

CONFIG = "scheduler_config.json"


class Schedule(NamedTuple):
    """The sampling settings of a model."""

    solver: Sampler
    process: Process
    """Diffusion process; for a flow including the shift."""
    grid: TimeGrid
    prediction: Prediction = Velocity()


def load_scheduler(folder: str | os.PathLike) -> Schedule:
    """Read the sampling settings of a folder with a `scheduler_config.json`.

    The steps, their times and the model times are those of diffusers' scheduler, with one exception: if DDIM's trailing
    steps do not divide the training steps, each step starts where the previous one ended, which diffusers' may miss by
    one.

    Raises:
      MissingError: the file does not exist.
      UserError: the scheduler or one of its settings is not supported.
    """
    path = Path(folder) / CONFIG
    document = read_json(path)
    kind = document.get("_class_name") if isinstance(document, dict) else None
    if kind not in _KINDS:
        raise UserError(f"{path} has a scheduler of class {kind}. Supported classes are {', '.join(_KINDS)}")
    fields, make = _KINDS[kind]
    settings = {name: value for name, value in document.items() if not name.startswith("_")}
    if unknown := sorted(settings.keys() - fields.keys()):
        raise UserError(f"{path} sets {', '.join(unknown)}. Supported settings of {kind} are {', '.join(fields)}")
    if settings.get("use_flow_sigmas"):
        fields = fields | _OF_A_FLOW
    values = {name: settings.get(name, field.default) for name, field in fields.items()}
    for name, value in values.items():
        if fields[name].known and value not in fields[name].known:
            supported = " or ".join(repr(option) for option in fields[name].known)
            raise UserError(f"{path} sets {name}={value!r}. Supported: {supported}")
        if fields[name].number and not (isinstance(value, int | float) and value > 0):
            raise UserError(f"{path} sets {name}={value!r}. Use a positive number")
    return make(values)


class _Field(NamedTuple):
    """A setting of a scheduler, with its supported values."""

    default: Any
    """Default of diffusers."""
    known: tuple[Any, ...] = ()
    """Supported values; if empty, all values are supported, or the setting has no effect."""
    number: bool = False
    """The value must be a positive number."""


_OFF = _Field(False, (False, None))
_NONE = _Field(None, (None,))
_NO_EFFECT = _Field(None)
_EITHER = (True, False)


def _betas(given: Mapping[str, Any]) -> Betas:
    if given["beta_schedule"] == "squaredcos_cap_v2":
        return Cosine()
    kind = Linear if given["beta_schedule"] == "linear" else ScaledLinear
    return kind(first=float(given["beta_start"]), last=float(given["beta_end"]))


def _process(given: Mapping[str, Any]) -> Process:
    if given.get("use_flow_sigmas"):
        return RectifiedFlow(shift=float(given["flow_shift"]))
    return VariancePreserving(betas=_betas(given), steps=int(given["num_train_timesteps"]))


def _schedule(given: Mapping[str, Any], solver: Sampler, grid: TimeGrid) -> Schedule:
    return Schedule(solver, _process(given), grid, _PREDICTIONS[given["prediction_type"]])


def _step_grid(given: Mapping[str, Any], **others: Any) -> StepGrid:
    return StepGrid(
        spacing=given.get("timestep_spacing", "linspace"),
        offset=int(given.get("steps_offset", 0)),
        last="data" if given.get("final_sigmas_type", "zero") == "zero" else "first step",
        ratios=_ratios(given),
        **others,
    )


def _ratios(given: Mapping[str, Any]) -> Literal["spaced", "karras", "exponential"]:
    if given.get("use_karras_sigmas"):
        return "karras"
    return "exponential" if given.get("use_exponential_sigmas") else "spaced"


def _ddim(given: Mapping[str, Any]) -> Schedule:
    end = "zero" if given["set_alpha_to_one"] else "sigma_min"
    return _schedule(given, Ddim(), _step_grid({**given, "final_sigmas_type": end}, told="nearest"))


def _ddpm(given: Mapping[str, Any]) -> Schedule:
    solver = Ddpm(variance="large" if given["variance_type"] == "fixed_large" else "small")
    schedule = _schedule(given, solver, _step_grid(given, told="nearest"))
    if given["variance_type"] != "learned_range":
        return schedule
    return schedule._replace(
        prediction=LearnedVariance(prediction=schedule.prediction, steps=given["num_train_timesteps"])
    )


def _euler(given: Mapping[str, Any]) -> Schedule:
    return _schedule(given, Euler(), _step_grid(given))


def _euler_ancestral(given: Mapping[str, Any]) -> Schedule:
    return _schedule(given, Ddim(eta=1.0), _step_grid(given))


def _heun(given: Mapping[str, Any]) -> Schedule:
    return _schedule(given, Heun(), _step_grid(given))


def _lcm(given: Mapping[str, Any]) -> Schedule:
    solver = Lcm(scaling=float(given["timestep_scaling"]) * given["num_train_timesteps"])
    return _schedule(given, solver, LcmGrid(distilled=int(given["original_inference_steps"])))


def _of_high_order(
    given: Mapping[str, Any], solver: Sampler, flow_grid: TimeGrid, *, cut: tuple[str, ...] = ("exponential",)
) -> Schedule:
    """Return the schedule of a high-order solver.

    The model time is rounded down to a step for the sigma spacings in `floored`, to the nearest step for others.
    """
    rounding = "below" if _ratios(given) in cut else "nearest"
    grid = flow_grid if given["use_flow_sigmas"] else _step_grid(given, told=rounding, spare=True)
    return _schedule(given, solver, grid)


def _dpm_multistep(given: Mapping[str, Any]) -> Schedule:
    solver = DpmMultistep(
        order=given["solver_order"],
        kind="heun" if given["solver_type"] == "heun" else "midpoint",
        eta=1.0 if given["algorithm_type"] == "sde-dpmsolver++" else 0.0,
        lower_order_final=given["lower_order_final"],
    )
    floored = ("karras", "exponential") if given["beta_schedule"] == "squaredcos_cap_v2" else ("exponential",)
    return _of_high_order(given, solver, DpmFlowGrid(training_steps=given["num_train_timesteps"]), cut=floored)


def _dpm_singlestep(given: Mapping[str, Any]) -> Schedule:
    solver = DpmSinglestep(
        kind="heun" if given["solver_type"] == "heun" else "midpoint", lower_order_final=given["lower_order_final"]
    )
    return _of_high_order(given, solver, DpmFlowGrid(training_steps=given["num_train_timesteps"]))


def _unipc(given: Mapping[str, Any]) -> Schedule:
    solver = UniPc(
        order=given["solver_order"],
        kind="bh1"
        if given["solver_type"] == "bh1"
        else "bh2",  # diffusers maps the names of three older solvers to `bh2`.
        lower_order_final=given["lower_order_final"],
        uncorrected=tuple(given["disable_corrector"]),
    )
    return _of_high_order(given, solver, UniPcGrid(training_steps=given["num_train_timesteps"]))


def _flow_match(given: Mapping[str, Any]) -> Schedule:
    grid = FlowMatchGrid(training_steps=given["num_train_timesteps"])
    return Schedule(Euler(), RectifiedFlow(shift=float(given["shift"])), grid)


_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Epsilon(),
    "sample": X0(),
    "v_prediction": V(),
    "flow_prediction": Velocity(),
}


def _noise_steps(*, scaled: bool = False, schedule: str = "linear", spacing: str = "leading") -> dict[str, _Field]:
    """Return the settings that all schedulers of DDPM's process share, with the defaults that differ among them."""
    first, last = (0.00085, 0.012) if scaled else (0.0001, 0.02)
    return {
        "num_train_timesteps": _Field(1000, number=True),
        "beta_start": _Field(first, number=True),
        "beta_end": _Field(last, number=True),
        "beta_schedule": _Field(schedule, ("linear", "scaled_linear", "squaredcos_cap_v2")),
        "trained_betas": _NONE,
        "prediction_type": _Field("epsilon", ("epsilon", "sample", "v_prediction")),
        "timestep_spacing": _Field(spacing, ("leading", "trailing", "linspace")),
        "steps_offset": _Field(0),
        "rescale_betas_zero_snr": _OFF,
        # Left over in folders that were converted from another scheduler.
        **dict.fromkeys(("clip_sample", "set_alpha_to_one", "skip_prk_steps"), _NO_EFFECT),
    }


_CLIPPING = {
    "clip_sample": _Field(True, (False,)),
    **dict.fromkeys(("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"), _NO_EFFECT),
    "thresholding": _OFF,
}
_KARRAS = {
    "use_karras_sigmas": _Field(False, (*_EITHER, None)),
    "use_exponential_sigmas": _Field(False, (*_EITHER, None)),
    "use_beta_sigmas": _OFF,
}
_FINAL = {"final_sigmas_type": _Field("zero", ("zero", "sigma_min"))}
_FLOW_SIGMAS = {
    "use_flow_sigmas": _Field(False, _EITHER),
    "flow_shift": _Field(1.0, number=True),
    "use_dynamic_shifting": _OFF,
    "time_shift_type": _NO_EFFECT,
    "thresholding": _OFF,
    "dynamic_thresholding_ratio": _NO_EFFECT,
    "sample_max_value": _NO_EFFECT,
}
_OF_A_FLOW = {
    "prediction_type": _Field("epsilon", ("flow_prediction",)),
    "use_karras_sigmas": _OFF,
    "use_exponential_sigmas": _OFF,
    "final_sigmas_type": _Field("zero", ("zero",)),
    **dict.fromkeys(
        (
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "timestep_spacing",
            "steps_offset",
            "rescale_betas_zero_snr",
            "sigma_min",
            "sigma_max",
        ),
        _NO_EFFECT,
    ),
}
"""Replacements of settings if flow sigmas are used."""
_DDIM = {
    **_noise_steps(),
    **_CLIPPING,
    "timestep_spacing": _Field("leading", ("leading", "trailing")),
    "set_alpha_to_one": _Field(True, _EITHER),
}
_DDPM = {
    **_noise_steps(),
    **_CLIPPING,
    "variance_type": _Field("fixed_small", ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")),
}
_EULER = {
    **_noise_steps(spacing="linspace"),
    **_KARRAS,
    **_FINAL,
    "interpolation_type": _Field("linear", ("linear",)),
    "timestep_type": _Field("discrete", ("discrete",)),
    "sigma_min": _NONE,
    "sigma_max": _NONE,
}
_EULER_ANCESTRAL = _noise_steps(spacing="linspace")
_HEUN = {
    **_noise_steps(scaled=True, spacing="linspace"),
    **_KARRAS,
    "clip_sample": _Field(False, (False,)),
    "clip_sample_range": _NO_EFFECT,
}
_LCM = {
    **_noise_steps(scaled=True, schedule="scaled_linear"),
    **_CLIPPING,
    "clip_sample": _Field(False, (False,)),
    "original_inference_steps": _Field(50, number=True),
    "timestep_scaling": _Field(10.0, number=True),
}
_DPM = {
    **_noise_steps(spacing="linspace"),
    **_KARRAS,
    **_FINAL,
    **_FLOW_SIGMAS,
    "solver_type": _Field("midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2")),
    "lambda_min_clipped": _Field(-float("inf"), (-float("inf"),)),
    "variance_type": _NONE,
}
_DPM_MULTISTEP = {
    **_DPM,
    "solver_order": _Field(2, (1, 2)),
    "algorithm_type": _Field("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++")),
    "lower_order_final": _Field(True, _EITHER),
    "euler_at_final": _OFF,
    "use_lu_lambdas": _OFF,
}
_DPM_SINGLESTEP = {
    **{name: field for name, field in _DPM.items() if name not in ("timestep_spacing", "steps_offset")},
    "solver_order": _Field(2, (2,)),
    "algorithm_type": _Field("dpmsolver++", ("dpmsolver++",)),
    "lower_order_final": _Field(False, _EITHER),
}
_UNIPC = {
    **_noise_steps(spacing="linspace"),
    **_KARRAS,
    **_FINAL,
    **_FLOW_SIGMAS,
    "solver_order": _Field(2, (1, 2, 3)),
    "solver_type": _Field("bh2", ("bh1", "bh2", "midpoint", "heun", "logrho")),
    "predict_x0": _Field(True, (True,)),
    "lower_order_final": _Field(True, _EITHER),
    "disable_corrector": _Field(()),
    "solver_p": _NONE,
    "shift_terminal": _NONE,
    "sigma_min": _NONE,
    "sigma_max": _NONE,
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
    "DDIMScheduler": (_DDIM, _ddim),
    "DDPMScheduler": (_DDPM, _ddpm),
    "EulerDiscreteScheduler": (_EULER, _euler),
    "EulerAncestralDiscreteScheduler": (_EULER_ANCESTRAL, _euler_ancestral),
    "HeunDiscreteScheduler": (_HEUN, _heun),
    "DPMSolverMultistepScheduler": (_DPM_MULTISTEP, _dpm_multistep),
    "DPMSolverSinglestepScheduler": (_DPM_SINGLESTEP, _dpm_singlestep),
    "LCMScheduler": (_LCM, _lcm),
}
