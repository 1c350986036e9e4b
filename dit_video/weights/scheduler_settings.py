"""Settings of diffusers' schedulers: their defaults, and the values that are supported."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dit_video.core.errors import UserError


class SchedulerSetting(NamedTuple):
    """A setting of a scheduler, with its supported values."""

    default: Any
    """Default of diffusers."""
    supported: tuple[Any, ...] = ()
    """Supported values; if empty, all values are supported, or the setting has no effect."""
    is_positive: bool = False
    """The value must be a positive number."""
    advice: str = ""
    """Advice that follows the supported values in the error message, such as another scheduler."""


def complete_settings(settings: Mapping[str, Any], fields: Mapping[str, SchedulerSetting]) -> dict[str, Any]:
    """Return the values of `fields`, the settings of a scheduler, and diffusers' defaults of those that are not set.

    Raises:
      UserError: a value is not supported, or two of them exclude each other.
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
# With uneven steps diffusers starts each step beside the end of the one before.
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
