"""The modules of models that LoRA files of other projects adapt, and our parameters that they correspond to."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dit_video.core import trees as trees
from dit_video.weights.tensor_map import TensorMapping

_BIASES = {"kernel": "bias", "scale": "shift"}


class LoraModule(NamedTuple):
    """The parameters of ours that another project's module corresponds to: a linear map, a norm or a table."""

    path: str | None
    """Path of our kernel, scale or table; None if only other models of the family have it, whose files are read."""
    layer: int | None = None
    """Layer of a stacked parameter."""
    columns: tuple[int, int] | None = None
    """Output columns, as start and end, of a kernel that computes several linear maps of theirs."""
    order: tuple[int, ...] | None = None
    """Index of their output for each of ours, if they are ordered differently."""
    mapping: TensorMapping | None = None
    """Mapping of their weight; None for a linear map, whose weight is `[o, i]`."""

    @property
    def bias_path(self) -> str | None:
        """Return the path of our bias, or of our norm's shift; None for a table, or a module that is not there."""
        front, _, leaf = (self.path or "").rpartition("/")
        return f"{front}/{_BIASES[leaf]}" if leaf in _BIASES else None


LoraModules = Mapping[str, LoraModule]
"""Modules by their name; if a module has several names, the first is written."""


GetLoraModules = Callable[[Any], Mapping[str, LoraModule]]
"""Function from a denoiser's config to the modules that its family's LoRA files change, by their names there."""


def no_lora_modules(config: Any) -> Mapping[str, LoraModule]:
    """Return no modules: those of a model whose LoRA files have native names only."""
    return {}


def add_module_prefix(modules: LoraModules, prefix: str) -> dict[str, LoraModule]:
    """Return the modules of a model whose parameters have a prefix, such as `backbone`, in those of a pipeline."""
    return {
        name: module if module.path is None else module._replace(path=f"{prefix}/{module.path}")
        for name, module in modules.items()
    }


def get_native_modules(params: Mapping[str, Any]) -> dict[str, LoraModule]:
    """Return the modules of all kernels of linear maps under native names.

    For example, `backbone.blocks.0.qkv` is layer 0 of `backbone/blocks/qkv/kernel`.

    Args:
      params: the model's parameters, or their shapes.
    """
    modules = {}
    for path, leaf in trees.flatten(params).items():
        module, stack = path.removesuffix("/kernel").replace("/", "."), re.search(r"(?:^|/)blocks(?=/)", path)
        if not path.endswith("/kernel"):
            continue
        if len(leaf.shape) == 2:
            modules[module] = LoraModule(path)
        elif len(leaf.shape) == 3 and stack is not None:
            name = f"{module[: stack.end()]}.{{}}{module[stack.end() :]}"
            modules |= expand_layers({path: name}, params)
    return modules


def expand_layers(names: Mapping[str, str], params: Mapping[str, Any]) -> dict[str, LoraModule]:
    """Return the modules for names such as `blocks.{}.attn1.to_q` (`{}` is the layer), given by our kernels' paths."""
    shapes = {path: leaf.shape for path, leaf in trees.flatten(params).items()}
    return {
        name.format(layer): LoraModule(path, layer if "{}" in name else None)
        for path, name in names.items()
        for layer in (range(shapes[path][0]) if "{}" in name else [0])
    }
