"""Scheduler configs of published folders, as their authors set them, without diffusers' version.

Each comment names where the values were read. Settings that belong to another scheduler, left over from a conversion,
are kept.
"""

_STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_NO_SPACINGS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_STABLE_15 = {
    **_STABLE,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
_STABLE_XL = {**_STABLE_15, "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0}
_COGVIDEOX = {
    **_STABLE,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
_QWEN = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
    **_NO_SPACINGS,
}
_WAN = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_flow_sigmas": True,
    **_NO_SPACINGS,
}
_DDPM = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}

PUBLISHED = {
    # huggingface/diffusers, docs/source/ja/tutorials: the printed scheduler of Stable Diffusion 1.5
    "stable-diffusion-1.5": {"_class_name": "PNDMScheduler", **_STABLE_15},
    # the same settings with v prediction: Stable Diffusion 2.1
    "stable-diffusion-2.1": {"_class_name": "DDIMScheduler", **_STABLE_15, "prediction_type": "v_prediction"},
    # huggingface/diffusers, scripts/convert_original_stable_diffusion_to_diffusers.py, and printed configs
    "stable-diffusion-xl": {"_class_name": "EulerDiscreteScheduler", **_STABLE_XL, "use_karras_sigmas": False},
    "sdxl-turbo": {"_class_name": "EulerAncestralDiscreteScheduler", **_STABLE_XL, "timestep_spacing": "trailing"},
    # the output of LCMScheduler.save_pretrained for SDXL
    "lcm-sdxl": {"_class_name": "LCMScheduler", **_STABLE_XL, "original_inference_steps": 50, "thresholding": False},
    # zero SNR and v prediction for images and views (Hunyuan3D-Paint)
    "zero-snr": {
        "_class_name": "DDIMScheduler",
        **_STABLE,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "clip_sample": False,
        "trained_betas": None,
    },
    # guoyww/animatediff-motion-adapter-v1-5-3, its card: Stable Diffusion's folder with linear betas
    "animatediff": {"_class_name": "DDIMScheduler", **_STABLE_15, "beta_schedule": "linear"},
    # facebook/DiT-XL-2-256
    "dit-xl": {
        "_class_name": "DDIMScheduler",
        **_DDPM,
        "clip_sample": False,
        "prediction_type": "epsilon",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "trained_betas": None,
    },
    # huggingface/diffusers, docs: google/ddpm-cat-256
    "ddpm-cat-256": {
        "_class_name": "DDPMScheduler",
        **_DDPM,
        "clip_sample": True,
        "trained_betas": None,
        "variance_type": "fixed_small",
    },
    # kandinsky-community/kandinsky-2-2-decoder
    "kandinsky-2.2": {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
        "thresholding": False,
    },
    # kandinsky-community/kandinsky-2-1, ddpm_scheduler
    "kandinsky-2.1": {
        "_class_name": "DDPMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 2.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 2.0,
        "thresholding": True,
        "trained_betas": None,
        "variance_type": "learned_range",
    },
    # DeepFloyd/IF-I-XL-v1.0
    "deepfloyd-if": {
        "_class_name": "DDPMScheduler",
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.95,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.5,
        "thresholding": True,
        "trained_betas": None,
        "variance_type": "learned_range",
        "lambda_min_clipped": -5.1,
    },
    # huggingface/diffusers, scripts/convert_cogvideox_to_diffusers.py; the card of CogVideoX-5b changes the class
    "cogvideox-2b": {"_class_name": "CogVideoXDDIMScheduler", **_COGVIDEOX, "snr_shift_scale": 3.0},
    "cogvideox-5b": {"_class_name": "CogVideoXDPMScheduler", **_COGVIDEOX, "snr_shift_scale": 1.0},
    # stabilityai/stable-video-diffusion-img2vid
    "stable-video-diffusion": {
        "_class_name": "EulerDiscreteScheduler",
        **_STABLE_15,
        "interpolation_type": "linear",
        "prediction_type": "v_prediction",
        "sigma_max": 700.0,
        "sigma_min": 0.002,
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    },
    # huggingface/diffusers, scripts/convert_ltx_to_diffusers.py: LTX-Video 0.9.0 and 0.9.1
    "ltx-video-0.9": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        **_QWEN,
        "base_image_seq_len": 1024,
        "base_shift": 0.95,
        "max_image_seq_len": 4096,
        "max_shift": 2.05,
        "shift_terminal": 0.1,
    },
    # black-forest-labs/FLUX.1-dev
    "flux-dev": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    },
    "qwen-image": {"_class_name": "FlowMatchEulerDiscreteScheduler", **_QWEN},
    # Tongyi-MAI/Z-Image-Turbo; Stable Diffusion 3 has these settings, too, HunyuanVideo with shift 7
    "z-image-turbo": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": 3.0,
    },
    # Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    "wan-2.1": {"_class_name": "UniPCMultistepScheduler", **_WAN},
    # flow_shift=5 and settings of a DPM-Solver, as in folders that were converted from one
    "wan-with-leftovers": {
        "_class_name": "UniPCMultistepScheduler",
        **_WAN,
        "euler_at_final": False,
        "flow_shift": 5.0,
        "lambda_min_clipped": -float("inf"),
        "solver_type": "midpoint",
        "use_lu_lambdas": False,
    },
    # PixArt-alpha
    "pixart-alpha": {
        "_class_name": "DPMSolverMultistepScheduler",
        **_DDPM,
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "lambda_min_clipped": -float("inf"),
        "lower_order_final": True,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "trained_betas": None,
        "use_karras_sigmas": False,
        "use_lu_lambdas": False,
        "variance_type": None,
    },
    # rhymes-ai/Allegro
    "allegro": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        **_DDPM,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
    },
}
