"""What the training of a denoiser leaves beside the pipeline: adapters and weights under other projects' names.

Of several processes the first writes.
"""

from pathlib import Path
from typing import Any

import jax

from dit_video.dit import DitConfig, WanDitConfig
from dit_video.files import atomic_path
from dit_video.weights import own_modules, save_denoiser, save_lora, wan_modules

ADAPTER, LORA = "adapter.safetensors", "pytorch_lora_weights.safetensors"
TRANSFORMERS = {"dit": "transformer", "low_noise": "transformer_2"}
"""folders of diffusers, by the expert"""


def save_adapter(
    folder: Path, dit: DitConfig | WanDitConfig, adapter: dict[str, Any], params: dict[str, Any], *, expert: str = "dit"
) -> None:
    """Write an adapter under our own names, and one of Wan as diffusers reads it: `load_lora_weights(folder)`.

    Args:
      folder: of the run.
      dit: the denoiser's config.
      adapter: with the parts of `params` that it changes.
      params: that it is of, `{"dit": ..., "text": ...}`, or their shapes.
      expert: what a pipeline calls the model, `dit` or, of the second of two experts, `low_noise`.
    """
    if jax.process_index() != 0:
        return
    named, of = ({expert if part == "dit" else part: tree[part] for part in tree} for tree in (adapter, params))
    save_lora(folder / ADAPTER, named, own_modules(of))
    if isinstance(dit, WanDitConfig) and "dit" in adapter:
        save_lora(folder / LORA, adapter["dit"], wan_modules(dit))


def save_transformer(
    folder: Path, dit: DitConfig | WanDitConfig, params: dict[str, Any], *, expert: str = "dit"
) -> None:
    """Write a whole transformer of Wan as diffusers reads it: `WanTransformer3DModel.from_pretrained(folder)`."""
    if not isinstance(dit, WanDitConfig) or jax.process_index() != 0:
        return
    with atomic_path(folder / TRANSFORMERS[expert]) as temporary:
        save_denoiser(temporary, dit, params["dit"])
