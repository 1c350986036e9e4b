"""LoRA adapters of Wan's transformers as files: under diffusers' names, ComfyUI's and kohya's.

What an adapter adds to queries and keys has its channels in another order there than here, as the kernels have (see
`wan_transformer`). The patches' embedding is a convolution in the files; adapters of it are not known here.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dit_video import tree as trees
from dit_video.dit import WanDitConfig
from dit_video.nn import param_shapes
from dit_video.weights.exchange import Foreign
from dit_video.weights.lora import Modules, Style, load_lora, numbered, save_lora
from dit_video.weights.wan_transformer import Layout, wan_names

_LAYOUTS: dict[Style, Layout] = {"diffusers": "diffusers", "comfyui": "authors", "kohya": "authors"}
_EMBEDDING = "embed/kernel"


def wan_modules(config: WanDitConfig, layout: Layout = "diffusers") -> Modules:
    """Which of our kernels the linear maps of a layout are."""
    kernels = {path: foreign.name.removesuffix(".weight") for path, foreign in _kernels(config, layout).items()}
    return numbered(kernels, param_shapes(config.make))


def load_wan_lora(path: str | os.PathLike, config: WanDitConfig, *, dtype: Any = np.float32) -> dict[str, Any]:
    """The adapter of a file, for `merge_lora` and `attach_lora` on the transformer's parameters.

    Args:
      path: a safetensors file, or a folder of PEFT or diffusers.
      config: the transformer's.
      dtype: factors are cast to it; None keeps the file's.

    Raises:
      MissingError: no such file.
      UserError: a pickled or corrupt file, or one that is no LoRA of this model.
    """
    modules = {**wan_modules(config, "authors"), **wan_modules(config)}
    lora = load_lora(path, param_shapes(config.make), modules, dtype=dtype)
    return _reordered(lora, config, lambda foreign, b: foreign.to_ours(np.ascontiguousarray(b.T)))


def save_wan_lora(
    path: str | os.PathLike,
    config: WanDitConfig,
    lora: Mapping[str, Any],
    *,
    style: Style = "diffusers",
    dtype: Any = None,
) -> None:
    """Write an adapter of a transformer; the inverse of `load_wan_lora`.

    diffusers' `load_lora_weights` reads a folder with a file `pytorch_lora_weights.safetensors` in the first style.

    Args:
      path: the file.
      config: the transformer's.
      lora: as `load_wan_lora` gives it.
      style: how tensors are named.
      dtype: factors are cast to it; None keeps what they are.

    Raises:
      UserError: an adapter of kernels that have no name there, such as the embedding of patches.
    """
    theirs = _reordered(lora, config, lambda foreign, b: np.ascontiguousarray(foreign.to_theirs(b).T))
    save_lora(path, theirs, wan_modules(config, _LAYOUTS[style]), style=style, dtype=dtype)


def _kernels(config: WanDitConfig, layout: Layout) -> dict[str, Foreign]:
    names = wan_names(config, layout)
    return {path: foreign for path, foreign in names.items() if path.endswith("/kernel") and path != _EMBEDDING}


def _reordered(
    lora: Mapping[str, Any], config: WanDitConfig, change: Callable[[Foreign, np.ndarray], np.ndarray]
) -> dict[str, Any]:
    """The adapter with the output channels of queries and keys, in `b` `[L r o]`, in the other order."""
    leaves = trees.flatten(lora)
    for path, foreign in _kernels(config, "diffusers").items():
        if foreign.sizes and f"{path}/b" in leaves:
            leaves[f"{path}/b"] = np.stack([change(foreign, np.asarray(layer)) for layer in leaves[f"{path}/b"]])
    return trees.unflatten(leaves)
