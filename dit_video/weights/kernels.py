"""Kernels that are not plain arrays (`nn.Kernel`) in safetensors files: their arrays, and their classes in the header.

The arrays of a kernel at `blocks/out/kernel` are tensors such as `blocks/out/kernel/scale`. The header names the class
of each such kernel, which must be registered, so that a file can never choose the code that runs.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np

from dit_video.core import config_json, registry
from dit_video.core.errors import UserError
from dit_video.core.trees import find_closest, flatten, map_with_path
from dit_video.nn import Kernel, is_kernel

_METADATA_KEY = "kernels"


def describe_kernels(tree: Any) -> dict[str, str]:
    """Return the metadata of a file with a tree's arrays: the class of each `Kernel` by its path; empty without any.

    Raises:
      UserError: If the class of a kernel is not registered, or other processes cannot import it, so that the file could
        not be read.
    """
    classes = {path: type(leaf) for path, leaf in flatten(tree, is_leaf=is_kernel).items() if is_kernel(leaf)}
    names = {path: registry.get_class_name(cls) for path, cls in classes.items()}
    for path, name in names.items():
        if registry.find_class(name) is not classes[path]:
            fix = "Decorate it with dit_video.core.registry.register"
            raise UserError(f"{path} cannot be written: its class {name} is not registered. {fix}")
        config_json.check_importable(name)
    return {_METADATA_KEY: json.dumps(names, sort_keys=True)} if names else {}


def get_kernel_classes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the class of each `Kernel` in a file with this metadata, by its path."""
    return json.loads(metadata.get(_METADATA_KEY, "{}"))


def add_kernels(like: Any, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Any:
    """Return the shapes that a file's parameters have, if it holds kernels in the place of arrays.

    Args:
      like: Shapes of the model's parameters, a tree of `jax.ShapeDtypeStruct`.
      shapes: Shapes of the file's tensors by name.
      metadata: Metadata of the file.

    Raises:
      UserError: If a kernel's class is not registered, or its arrays do not fit the class or the model.
    """
    names = get_kernel_classes(metadata)
    if unknown := sorted(names.keys() - flatten(like).keys()):
        closest = find_closest(unknown[0], flatten(like))
        raise UserError(f"the file has a kernel {unknown[0]}, which the model lacks; the closest are {closest}")

    def replace(path: str, leaf: Any) -> Any:
        return _make_shapes(path, leaf, names[path], shapes) if path in names else leaf

    return map_with_path(replace, like)


def _make_shapes(path: str, leaf: Any, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Kernel:
    """Return a kernel of the class `name` with the shapes of its arrays in the file."""
    cls = registry.find_class(name)
    if cls is None or not issubclass(cls, Kernel):
        fix = "Import the module that registers it"
        raise UserError(f"{path} is a {name}, which is not registered as a kernel. {fix}")
    fields = [field.name for field in dataclasses.fields(cast(Any, cls))]
    if missing := [field for field in fields if f"{path}/{field}" not in shapes]:
        raise UserError(f"{path} is a {name}, but the file lacks its {', '.join(missing)}. Write the file again")
    kernel = cls(**{field: jax.ShapeDtypeStruct(shapes[f"{path}/{field}"], np.float32) for field in fields})
    if tuple(kernel.shape) != tuple(leaf.shape):
        rule = f"it stands for {list(kernel.shape)}, the model has {list(leaf.shape)}"
        raise UserError(f"{path}, a {name}, does not fit the model: {rule}. Use the config it was made with")
    return kernel
