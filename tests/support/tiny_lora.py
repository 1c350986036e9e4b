"""A small pipeline with random weights, and files of adapters for it."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dit_video.core.offload import Offload
from dit_video.core.trees import flatten, map_with_path
from dit_video.distributed import Parallelism
from dit_video.models.backbones.dit import DiTConfig
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.tokens import Grid
from dit_video.weights import get_native_modules, save
from support.random_params import make_random_params
from support.tiny import EXPERIMENT

BACKBONE = DiTConfig(channels=4, context_width=16, patch=Grid(1, 2, 2), width=64, layers=2, heads=4, attention="dense")
CONFIG = PipelineConfig(
    model=replace(EXPERIMENT.get_model(), backbone=BACKBONE, fps=16.0),
    batch=1,
    sampling=EXPERIMENT.sampling,
    size=Grid(5, 16, 16),
)


def make_pipeline(
    config: PipelineConfig = CONFIG,
    *,
    dtype: str = "float32",
    parallel: Parallelism | None = None,
    offload: Offload | None = None,
) -> Pipeline:
    """Return a pipeline with random weights, the same ones each time, in arrays of its own.

    Kernels, and their products, have the dtype.
    """
    model = config.model.replace_backbone(dtype=dtype)
    denoiser = {
        "backbone": make_random_params(model.backbone.make),
        "text": make_random_params(model.text_encoder.make),
    }
    if config.boundary is not None:
        denoiser["low_noise"] = make_random_params(model.backbone.make, seed=1)
    denoiser = map_with_path(
        lambda path, leaf: np.array(leaf, jnp.dtype(dtype) if path.endswith("kernel") else np.float32), denoiser
    )
    return Pipeline(
        replace(config, model=model),
        autoencoder=make_random_params(model.autoencoder.make),
        denoiser=denoiser,
        parallel=parallel,
        offload=offload,
    )


def write_lora(path: Path, pipeline: Pipeline, *, seed: int = 0, expert: str = "backbone") -> Path:
    """Write an adapter of rank 1 for all kernels in an expert's blocks, with differences of their biases."""
    params, noise, tensors = pipeline.denoiser_params, np.random.default_rng(seed), {}
    leaves = flatten(params)
    for name, module in get_native_modules(params).items():
        if not name.startswith(f"{expert}.blocks."):
            continue
        features_in, features_out = leaves[module.path].shape[-2:]
        shapes = {"lora_down.weight": (1, features_in), "lora_up.weight": (features_out, 1)}
        if module.bias_path in leaves:
            shapes["diff_b"] = (features_out,)
        tensors |= {
            f"{name}.{part}": (0.3 * noise.normal(size=shape)).astype(np.float32) for part, shape in shapes.items()
        }
    save(path, tensors)
    return path
