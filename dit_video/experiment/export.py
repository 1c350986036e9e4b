"""Results of a training under other projects' names: adapters and weights.

With several processes all of them call the functions that write: the first one writes what they gather.
"""

import contextlib
from pathlib import Path
from typing import Any

from dit_video.core.files import atomic_path
from dit_video.distributed.gather import gather_parts, is_first_process, to_host
from dit_video.families import find_format, get_lora_modules
from dit_video.families.family import DENOISER_FOLDERS
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.weights import get_native_modules, save_lora

ADAPTER_FILE, LORA_FILE = "adapter.safetensors", "pytorch_lora_weights.safetensors"


def save_adapter(
    folder: Path, backbone: BackboneConfig, adapter: dict[str, Any], params: dict[str, Any], *, expert: str = "backbone"
) -> None:
    """Write an adapter under our own names, and under its family's, as diffusers reads it: `load_lora_weights(folder)`.

    Args:
      folder: Folder of the run.
      backbone: The denoiser's config.
      adapter: The adapter, with the parts of `params` that it changes.
      params: The adapted parameters `{"backbone": ..., "text": ...}`, or their shapes.
      expert: Name of the model in a pipeline: `backbone` or, for the second of two experts, `low_noise`.
    """
    adapter = to_host(adapter)
    if not is_first_process():
        return
    named, base = ({expert if name == "backbone" else name: each[name] for name in each} for each in (adapter, params))
    save_lora(folder / ADAPTER_FILE, named, get_native_modules(base))
    if (modules := get_lora_modules(backbone)) and "backbone" in adapter:
        save_lora(folder / LORA_FILE, adapter["backbone"], modules)


def save_transformer(
    folder: Path, backbone: BackboneConfig, params: dict[str, Any], *, expert: str = "backbone"
) -> None:
    """Write a complete denoiser as its family's class in diffusers reads it; nothing if there is none."""
    denoiser_format = find_format(backbone)
    if denoiser_format is None or not denoiser_format.can_express(backbone):
        return
    target, is_writer = folder / DENOISER_FOLDERS[expert], is_first_process()
    with atomic_path(target) if is_writer else contextlib.nullcontext(target) as temporary:
        denoiser_format.save(temporary, backbone, gather_parts(params["backbone"]), is_writer=is_writer)
