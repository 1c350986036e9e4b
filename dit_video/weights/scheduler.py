"""Sampling settings of a diffusers folder: `scheduler_config.json` as solver, process, time schedule and prediction."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.diffusion import (
    X0,
    BetaSchedule,
    BetaTimes,
    ClippedPrediction,
    CosineBetas,
    Ddim,
    Ddpm,
    DiscreteSchedule,
    DpmFlowSchedule,
    DpmMultistep,
    DpmSinglestep,
    Edm,
    Epsilon,
    Euler,
    ExponentialShift,
    ExponentialTimes,
    FlowMatchSchedule,
    Heun,
    KarrasTimes,
    Lcm,
    LcmSchedule,
    LearnedVariance,
    LinearBetas,
    LinearShift,
    Pndm,
    Prediction,
    Process,
    RectifiedFlow,
    ScaledLinearBetas,
    Solver,
    ThresholdedPrediction,
    TimeSchedule,
    UniPc,
    UniPcFlowSchedule,
    V,
    VariancePreservingProcess,
    Velocity,
)


class SchedulerSetting(NamedTuple):
    """A setting of a scheduler, with its supported values."""

    default: Any
    """diffusers' default."""
    supported: tuple[Any, ...] = ()
    """Supported values; if empty, all values are supported, or the setting has no effect."""
    is_positive: bool = False
    """The value must be a positive number."""
    advice: str = ""
    """Advice that follows the supported values in the error message, such as another scheduler."""


def complete_settings(settings: Mapping[str, Any], fields: Mapping[str, SchedulerSetting]) -> dict[str, Any]:
    """Return the values of a scheduler's settings, `fields`, with diffusers' defaults for those that are not set.

    Raises:
      UserError: If a value is not supported, or two values exclude each other.
    """
    if settings.get("use_flow_sigmas"):
        fields = {name: _FLOW_OVERRIDES.get(name, field) for name, field in fields.items()}
    values = {name: settings.get(name, field.default) for name, field in fields.items()}
    for name, value in values.items():
        if fields[name].supported and value not in fields[name].supported:
            supported = " or ".join(repr(option) for option in fields[name].supported)
            raise UserError(f"{name}={value!r}. Supported: {supported}{fields[name].advice}")
        if fields[name].is_positive and not _is_positive(value):
            raise UserError(f"{name}={value!r}. Use a positive number")
    spacings = [name for name in SIGMA_SPACINGS if values.get(name)]
    if len(spacings) > 1:
        raise UserError(f"{' and '.join(spacings)} are exclusive. Use one of them")
    if values.get("rescale_betas_zero_snr") and values["prediction_type"] == "epsilon":
        raise UserError(
            "rescale_betas_zero_snr=True with prediction_type='epsilon' is not supported: pure noise does not "
            "determine the data. Use the prediction_type that the model was trained with, 'v_prediction' or 'sample'"
        )
    return values


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


SIGMA_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

_BOOLEAN = (True, False, None)
_OFF = SchedulerSetting(False, (False, None))
_NONE = SchedulerSetting(None, (None,))
_NO_EFFECT = SchedulerSetting(None)
_SWITCH = SchedulerSetting(False, _BOOLEAN)


def _make_ddpm_settings(
    *, scaled: bool = False, schedule: str = "linear", spacing: str = "leading"
) -> dict[str, SchedulerSetting]:
    """Return the settings that all schedulers of DDPM's process share, with the defaults that differ among them."""
    first, last = (0.00085, 0.012) if scaled else (0.0001, 0.02)
    return {
        "num_train_timesteps": SchedulerSetting(1000, is_positive=True),
        "beta_start": SchedulerSetting(first, is_positive=True),
        "beta_end": SchedulerSetting(last, is_positive=True),
        "beta_schedule": SchedulerSetting(schedule, ("linear", "scaled_linear", "squaredcos_cap_v2")),
        "trained_betas": _NONE,
        "prediction_type": SchedulerSetting("epsilon", ("epsilon", "sample", "v_prediction")),
        "timestep_spacing": SchedulerSetting(spacing, ("leading", "trailing", "linspace")),
        "steps_offset": SchedulerSetting(0),
    }


_ZERO_SNR = {"rescale_betas_zero_snr": _SWITCH}
_THRESHOLDING = {
    "thresholding": _SWITCH,
    "dynamic_thresholding_ratio": SchedulerSetting(0.995, is_positive=True),
    "sample_max_value": SchedulerSetting(1.0, is_positive=True),
}
_CLIPPING = {
    **_THRESHOLDING,
    "clip_sample": SchedulerSetting(True, _BOOLEAN),
    "clip_sample_range": SchedulerSetting(1.0, is_positive=True),
}
_SIGMA_SPACINGS = dict.fromkeys(SIGMA_SPACINGS, _SWITCH)
_SIGMAS = {
    **_make_ddpm_settings(spacing="linspace"),
    **_ZERO_SNR,
    **_SIGMA_SPACINGS,
    "final_sigmas_type": SchedulerSetting("zero", ("zero", "sigma_min")),
}
_FLOW_SIGMAS = {
    **_THRESHOLDING,
    "use_flow_sigmas": SchedulerSetting(False, (True, False)),
    "flow_shift": SchedulerSetting(1.0, is_positive=True),
    "use_dynamic_shifting": _OFF._replace(advice=". For a shift by size use FlowMatchEulerDiscreteScheduler"),
    "time_shift_type": _NO_EFFECT,
}
_FLOW_OVERRIDES = {
    "prediction_type": SchedulerSetting("epsilon", ("flow_prediction",)),
    "final_sigmas_type": SchedulerSetting("zero", ("zero",)),
    **dict.fromkeys((*SIGMA_SPACINGS, "use_lu_lambdas"), _OFF),
    **dict.fromkeys(("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"), _NO_EFFECT),
    **dict.fromkeys(("timestep_spacing", "steps_offset", "sigma_min", "sigma_max"), _NO_EFFECT),
}
"""Replacements of settings if flow sigmas are used."""
# With uneven steps, diffusers does not start each step where the previous one ended.
_UNIFORM_STEPS = {"timestep_spacing": SchedulerSetting("leading", ("leading", "trailing"))}
DDIM = {
    **_make_ddpm_settings(),
    **_ZERO_SNR,
    **_CLIPPING,
    **_UNIFORM_STEPS,
    "set_alpha_to_one": SchedulerSetting(True, (True, False)),
}
COGVIDEOX_DDIM = {
    **_make_ddpm_settings(scaled=True, schedule="scaled_linear"),
    **_ZERO_SNR,
    **_UNIFORM_STEPS,
    "set_alpha_to_one": SchedulerSetting(True, (True, False)),
    "snr_shift_scale": SchedulerSetting(3.0, is_positive=True),
}
COGVIDEOX_DPM = {**COGVIDEOX_DDIM, "set_alpha_to_one": SchedulerSetting(True, (True,))}
DDPM = {
    **_make_ddpm_settings(),
    **_ZERO_SNR,
    **_CLIPPING,
    "variance_type": SchedulerSetting(
        "fixed_small", ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
    ),
}
PNDM = {
    **_make_ddpm_settings(),
    **_UNIFORM_STEPS,
    "prediction_type": SchedulerSetting("epsilon", ("epsilon", "v_prediction")),
    "set_alpha_to_one": SchedulerSetting(False, (True, False)),
    "skip_prk_steps": SchedulerSetting(False, (True, False)),
}
EULER = {
    **_SIGMAS,
    "interpolation_type": SchedulerSetting("linear", ("linear",)),
    "timestep_type": SchedulerSetting("discrete", ("discrete", "continuous")),
    **dict.fromkeys(("sigma_min", "sigma_max"), SchedulerSetting(None)),
}
EULER_ANCESTRAL = {**_make_ddpm_settings(spacing="linspace"), **_ZERO_SNR}
HEUN = {
    **_make_ddpm_settings(scaled=True, spacing="linspace"),
    **_SIGMA_SPACINGS,
    "clip_sample": SchedulerSetting(False, _BOOLEAN),
    "clip_sample_range": SchedulerSetting(1.0, is_positive=True),
    "rescale_betas_zero_snr": _OFF,
}
LCM = {
    **_make_ddpm_settings(scaled=True, schedule="scaled_linear"),
    **_ZERO_SNR,
    **_CLIPPING,
    "clip_sample": SchedulerSetting(False, _BOOLEAN),
    "original_inference_steps": SchedulerSetting(50, is_positive=True),
    "timestep_scaling": SchedulerSetting(10.0, is_positive=True),
}
_DPM = {
    **_SIGMAS,
    **_FLOW_SIGMAS,
    "solver_type": SchedulerSetting("midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2")),
    "lambda_min_clipped": SchedulerSetting(-math.inf, (-math.inf,)),
    "variance_type": _NONE,
}
DPM_MULTISTEP = {
    **_DPM,
    "solver_order": SchedulerSetting(2, (1, 2)),
    "algorithm_type": SchedulerSetting("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++")),
    "lower_order_final": SchedulerSetting(True, (True, False)),
    "euler_at_final": _SWITCH,
    "use_lu_lambdas": _SWITCH,
}
DPM_SINGLESTEP = {
    **{name: field for name, field in _DPM.items() if name not in ("timestep_spacing", "steps_offset")},
    "rescale_betas_zero_snr": _OFF,
    "solver_order": SchedulerSetting(2, (2,)),
    "algorithm_type": SchedulerSetting("dpmsolver++", ("dpmsolver++",)),
    "lower_order_final": SchedulerSetting(False, (True, False)),
}
UNIPC = {
    **_SIGMAS,
    **_FLOW_SIGMAS,
    "solver_order": SchedulerSetting(2, (1, 2, 3)),
    "solver_type": SchedulerSetting("bh2", ("bh1", "bh2", "midpoint", "heun", "logrho")),
    "predict_x0": SchedulerSetting(True, (True,)),
    "lower_order_final": SchedulerSetting(True, (True, False)),
    "disable_corrector": SchedulerSetting(()),
    "shift_terminal": SchedulerSetting(None),
    **dict.fromkeys(("solver_p", "sigma_min", "sigma_max"), _NONE),
}
FLOW_MATCH = {
    "num_train_timesteps": SchedulerSetting(1000, is_positive=True),
    "shift": SchedulerSetting(1.0, is_positive=True),
    "shift_terminal": SchedulerSetting(None),
    "use_dynamic_shifting": _SWITCH,
    "base_shift": SchedulerSetting(0.5),
    "max_shift": SchedulerSetting(1.15),
    "base_image_seq_len": SchedulerSetting(256, is_positive=True),
    "max_image_seq_len": SchedulerSetting(4096, is_positive=True),
    "time_shift_type": SchedulerSetting("exponential", ("exponential", "linear")),
    "stochastic_sampling": _SWITCH,
    "invert_sigmas": _OFF,
    **_SIGMA_SPACINGS,
}


CONFIG_FILE = "scheduler_config.json"


class LoadedScheduler(NamedTuple):
    """The sampling settings of a model."""

    solver: Solver
    process: Process
    """Diffusion process; for a flow it includes the shift."""
    time_schedule: TimeSchedule
    prediction: Prediction = Velocity()


def load_scheduler(folder: str | os.PathLike) -> LoadedScheduler:
    """Read the sampling settings of a folder with a `scheduler_config.json`.

    The steps, their times and the model times (in units of `num_train_timesteps`) are the same as in diffusers'
    scheduler, with one exception: if the trailing steps of DDIM or PNDM do not divide the training steps, each step
    starts where the previous one ended, which diffusers' may miss by one. With dynamic shifting, the shift or its
    logarithm is linear in the number of tokens of a clip, as in most pipelines of diffusers.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the scheduler or one of its settings is not supported.
    """
    path = Path(folder) / CONFIG_FILE
    document = read_json(path)
    kind = document.get("_class_name") if isinstance(document, dict) else None
    if kind not in _SCHEDULERS:
        raise UserError(f"{path} has a scheduler of class {kind}. Supported classes are {', '.join(_SCHEDULERS)}")
    fields, make = _SCHEDULERS[kind]
    settings = {name: value for name, value in document.items() if not name.startswith("_")}
    # Folders that were converted from another scheduler still have its settings, which diffusers does not read.
    readable = set().union(*(table for table, _ in _SCHEDULERS.values()))
    if unknown := sorted(settings.keys() - readable):
        raise UserError(f"{path} sets {', '.join(unknown)}. Supported settings of {kind} are {', '.join(fields)}")
    try:
        return make(complete_settings(settings, fields))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _make_betas(settings: Mapping[str, Any]) -> BetaSchedule:
    if settings["beta_schedule"] == "squaredcos_cap_v2":
        return CosineBetas()
    kind = LinearBetas if settings["beta_schedule"] == "linear" else ScaledLinearBetas
    return kind(beta_start=float(settings["beta_start"]), beta_end=float(settings["beta_end"]))


def _make_process(settings: Mapping[str, Any]) -> Process:
    if settings.get("use_flow_sigmas"):
        return RectifiedFlow(shift=float(settings["flow_shift"]))
    return VariancePreservingProcess(
        betas=_make_betas(settings),
        steps=int(settings["num_train_timesteps"]),
        snr_shift=float(settings.get("snr_shift_scale", 1.0)),
        zero_terminal_snr=bool(settings.get("rescale_betas_zero_snr")),
    )


def _make_prediction(settings: Mapping[str, Any], *, clips: bool = False, recompute_noise: bool = False) -> Prediction:
    """Return the prediction; `clips` says that the scheduler reads `clip_sample`."""
    prediction = _PREDICTIONS[settings["prediction_type"]]
    options: dict[str, Any] = {"prediction": prediction, "recompute_noise": recompute_noise}
    if settings.get("thresholding"):
        quantile, threshold = settings["dynamic_thresholding_ratio"], settings["sample_max_value"]
        return ThresholdedPrediction(**options, quantile=float(quantile), max_threshold=float(threshold))
    if clips and settings["clip_sample"]:
        return ClippedPrediction(**options, max_value=float(settings["clip_sample_range"]))
    return prediction


def _make_schedule(
    settings: Mapping[str, Any], solver: Solver, time_schedule: TimeSchedule, **options: bool
) -> LoadedScheduler:
    return LoadedScheduler(solver, _make_process(settings), time_schedule, _make_prediction(settings, **options))


def _make_step_schedule(settings: Mapping[str, Any], **others: Any) -> DiscreteSchedule:
    return DiscreteSchedule(
        spacing=settings.get("timestep_spacing", "linspace"),
        steps_offset=int(settings.get("steps_offset", 0)),
        end="data" if settings.get("final_sigmas_type", "zero") == "zero" else "first step",
        ratio_spacing=_get_sigma_spacing(settings) or "spaced",
        **others,
    )


def _make_sigma_schedule(settings: Mapping[str, Any], **others: Any) -> DiscreteSchedule:
    """Return the schedule of a scheduler that steps in sigmas and needs them to be finite."""
    ratio = _MAX_SIGMA if settings.get("rescale_betas_zero_snr") else None
    return _make_step_schedule(settings, terminal_ratio=ratio, **others)


_MAX_SIGMA = (2**24 - 1) ** 0.5
"""Largest sigma of diffusers' schedulers: after the last step they replace a zero alpha squared by 2^-24."""


def _get_sigma_spacing(settings: Mapping[str, Any]) -> Literal["karras", "exponential", "beta"] | None:
    if settings.get("use_karras_sigmas"):
        return "karras"
    if settings.get("use_exponential_sigmas") or settings.get("use_lu_lambdas"):
        return "exponential"
    return "beta" if settings.get("use_beta_sigmas") else None


def _make_alpha_schedule(settings: Mapping[str, Any]) -> DiscreteSchedule:
    """Return the schedule of a scheduler that ends at the data or after the first noise step."""
    end = "zero" if settings["set_alpha_to_one"] else "sigma_min"
    return _make_step_schedule({**settings, "final_sigmas_type": end}, step_rounding="nearest")


def _make_ddim(settings: Mapping[str, Any]) -> LoadedScheduler:
    return _make_schedule(settings, Ddim(), _make_alpha_schedule(settings), clips=True)


def _make_cogvideox_ddim(settings: Mapping[str, Any]) -> LoadedScheduler:
    return _make_schedule(settings, Ddim(), _make_alpha_schedule(settings))


def _make_cogvideox_dpm(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = DpmMultistep(eta=1.0, lower_order_final=False)
    return _make_schedule(settings, solver, _make_alpha_schedule(settings))


def _make_pndm(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = Pndm(
        start="heun" if settings["skip_prk_steps"] else "runge-kutta",
        value="v" if settings["prediction_type"] == "v_prediction" else "slope",
        training_steps=int(settings["num_train_timesteps"]),
    )
    return _make_schedule(settings, solver, _make_alpha_schedule(settings))


def _make_ddpm(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = Ddpm(variance="large" if settings["variance_type"] == "fixed_large" else "small")
    schedule = _make_schedule(settings, solver, _make_step_schedule(settings, step_rounding="nearest"), clips=True)
    if settings["variance_type"] != "learned_range":
        return schedule
    prediction = LearnedVariance(prediction=schedule.prediction, steps=settings["num_train_timesteps"])
    return schedule._replace(prediction=prediction)


def _make_euler(settings: Mapping[str, Any]) -> LoadedScheduler:
    sigmas = settings["sigma_min"], settings["sigma_max"]
    # diffusers reads the type of timesteps for this prediction only.
    is_continuous = settings["timestep_type"] == "continuous" and settings["prediction_type"] == "v_prediction"
    if sigmas == (None, None) and not is_continuous:
        return _make_schedule(settings, Euler(), _make_sigma_schedule(settings))
    spacing, end = _get_sigma_spacing(settings), settings["final_sigmas_type"]
    if (
        not is_continuous
        or spacing is None
        or end != "zero"
        or not all(isinstance(each, int | float) for each in sigmas)
    ):
        raise UserError(
            f"sigma_min={sigmas[0]}, sigma_max={sigmas[1]}, timestep_type={settings['timestep_type']!r}, "
            f"prediction_type={settings['prediction_type']!r}, final_sigmas_type={end!r} is not supported. Use both "
            "sigmas with timestep_type='continuous', prediction_type='v_prediction', final_sigmas_type='zero' and "
            "use_karras_sigmas, use_exponential_sigmas or use_beta_sigmas, or none of the sigmas"
        )
    schedule = _RATIO_TIMES[spacing](
        min_ratio=float(sigmas[0]),
        max_ratio=float(sigmas[1]),
        log_ratio_scale=0.25 / settings["num_train_timesteps"],
    )
    return LoadedScheduler(Euler(), Edm(sigma_max=float(sigmas[1]), data_std=1.0), schedule, V())


def _make_euler_ancestral(settings: Mapping[str, Any]) -> LoadedScheduler:
    return _make_schedule(settings, Ddim(eta=1.0), _make_sigma_schedule(settings))


def _make_heun(settings: Mapping[str, Any]) -> LoadedScheduler:
    return _make_schedule(settings, Heun(), _make_step_schedule(settings), clips=True, recompute_noise=True)


def _make_lcm(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = Lcm(scaling=float(settings["timestep_scaling"]) * settings["num_train_timesteps"])
    grid = LcmSchedule(distillation_steps=int(settings["original_inference_steps"]))
    return _make_schedule(settings, solver, grid, clips=True)


def _make_high_order(
    settings: Mapping[str, Any],
    solver: Solver,
    flow_schedule: TimeSchedule,
    *,
    floored: tuple[str, ...] = ("exponential", "beta"),
) -> LoadedScheduler:
    """Return the schedule of a high-order solver.

    The model time is rounded down to a step for the sigma spacings in `floored`, to the nearest step for others.
    """
    if settings["use_flow_sigmas"]:
        return _make_schedule(settings, solver, flow_schedule)
    rounding = "below" if _get_sigma_spacing(settings) in floored else "nearest"
    grid = _make_sigma_schedule(settings, step_rounding=rounding, has_extra_step=True)
    return _make_schedule(settings, solver, grid)


def _make_dpm_multistep(settings: Mapping[str, Any]) -> LoadedScheduler:
    if settings["euler_at_final"] and settings["final_sigmas_type"] != "zero":
        raise UserError("euler_at_final=True is not supported with final_sigmas_type='sigma_min'. Use 'zero'")
    if settings["use_lu_lambdas"] and settings["use_karras_sigmas"]:
        settings = {**settings, "use_lu_lambdas": False}
    solver = DpmMultistep(
        order=settings["solver_order"],
        kind="heun" if settings["solver_type"] == "heun" else "midpoint",
        eta=1.0 if settings["algorithm_type"] == "sde-dpmsolver++" else 0.0,
        lower_order_final=settings["lower_order_final"],
    )
    is_rounded = settings["beta_schedule"] != "squaredcos_cap_v2"
    floored = ("beta",) if is_rounded and settings["use_lu_lambdas"] else ("exponential", "beta")
    floored = floored if is_rounded else ("karras", *floored)
    grid = DpmFlowSchedule(training_steps=settings["num_train_timesteps"])
    return _make_high_order(settings, solver, grid, floored=floored)


def _make_dpm_singlestep(settings: Mapping[str, Any]) -> LoadedScheduler:
    solver = DpmSinglestep(
        kind="heun" if settings["solver_type"] == "heun" else "midpoint",
        lower_order_final=settings["lower_order_final"],
    )
    return _make_high_order(settings, solver, DpmFlowSchedule(training_steps=settings["num_train_timesteps"]))


def _make_unipc(settings: Mapping[str, Any]) -> LoadedScheduler:
    if settings["shift_terminal"] and not settings["use_flow_sigmas"]:
        raise UserError("shift_terminal without use_flow_sigmas=True is not supported. Use shift_terminal=None")
    solver = UniPc(
        order=settings["solver_order"],
        # diffusers maps the names of three older solvers to `bh2`.
        kind="bh1" if settings["solver_type"] == "bh1" else "bh2",
        lower_order_final=settings["lower_order_final"],
        uncorrected_steps=tuple(settings["disable_corrector"]),
    )
    terminal_time = settings["shift_terminal"] or None
    grid = UniPcFlowSchedule(training_steps=settings["num_train_timesteps"], terminal_time=terminal_time)
    return _make_high_order(settings, solver, grid)


def _make_flow_match(settings: Mapping[str, Any]) -> LoadedScheduler:
    grid = FlowMatchSchedule(
        training_steps=settings["num_train_timesteps"],
        is_end_shifted_twice=not settings["use_dynamic_shifting"],
        terminal_time=settings["shift_terminal"] or None,
        spacing=_get_sigma_spacing(settings) or "uniform",
    )
    solver = Lcm(scaling=None) if settings["stochastic_sampling"] else Euler()
    if not settings["use_dynamic_shifting"]:
        return LoadedScheduler(solver, RectifiedFlow(shift=float(settings["shift"])), grid)
    tokens = int(settings["base_image_seq_len"]), int(settings["max_image_seq_len"])
    first, last = settings["base_shift"], settings["max_shift"]
    if not (isinstance(first, int | float) and isinstance(last, int | float)):
        raise UserError(f"base_shift={first}, max_shift={last} is invalid with dynamic shifting. Use two numbers")
    ends = float(first), float(last)
    if settings["time_shift_type"] == "linear":
        return LoadedScheduler(
            solver, RectifiedFlow(size_shift=LinearShift(tokens=tokens, shifts=ends, per="clip")), grid
        )
    return LoadedScheduler(solver, RectifiedFlow(size_shift=ExponentialShift(tokens=tokens, mu=ends)), grid)


_PREDICTIONS = {"epsilon": Epsilon(), "sample": X0(), "v_prediction": V(), "flow_prediction": Velocity()}
_RATIO_TIMES = {"karras": KarrasTimes, "exponential": ExponentialTimes, "beta": BetaTimes}
_SCHEDULERS: dict[str, tuple[dict[str, SchedulerSetting], Callable[[Mapping[str, Any]], LoadedScheduler]]] = {
    "UniPCMultistepScheduler": (UNIPC, _make_unipc),
    "FlowMatchEulerDiscreteScheduler": (FLOW_MATCH, _make_flow_match),
    "DDIMScheduler": (DDIM, _make_ddim),
    "DDPMScheduler": (DDPM, _make_ddpm),
    "PNDMScheduler": (PNDM, _make_pndm),
    "EulerDiscreteScheduler": (EULER, _make_euler),
    "EulerAncestralDiscreteScheduler": (EULER_ANCESTRAL, _make_euler_ancestral),
    "HeunDiscreteScheduler": (HEUN, _make_heun),
    "DPMSolverMultistepScheduler": (DPM_MULTISTEP, _make_dpm_multistep),
    "DPMSolverSinglestepScheduler": (DPM_SINGLESTEP, _make_dpm_singlestep),
    "LCMScheduler": (LCM, _make_lcm),
    "CogVideoXDDIMScheduler": (COGVIDEOX_DDIM, _make_cogvideox_ddim),
    "CogVideoXDPMScheduler": (COGVIDEOX_DPM, _make_cogvideox_dpm),
}
