"""Names of tensors in LoRA files, and the parts of modules that they are.

A tensor is a factor of a linear map (`lora_A` and `lora_B`, or `lora_down` and `lora_up`), the `alpha` of its scale, or
a full difference: `diff` of a module's weight, `diff_b` of its bias, `diff_m` of a block's modulation. Differences are
those of ComfyUI (`comfy/lora.py`) and of LightX2V (`tools/extract/lora_extractor.py`).
"""

import collections
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dit_video.core.errors import UserError
from dit_video.weights import safetensors as ours
from dit_video.weights.lora_modules import LoraModule, LoraModules
from dit_video.weights.tensor_map import get_their_shape

ModulePart = Literal["a", "b", "alpha", "diff", "diff_b"]
"""Part of a module that a tensor holds."""

_COUNTERPART = {"lora_A": "lora_B", "lora_B": "lora_A", "lora_down": "lora_up", "lora_up": "lora_down"}
_TENSOR_NAME = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<factor>lora_A|lora_B|lora_down|lora_up)(?P<rest>(?:\.default)?\.weight)|(?P<other>alpha|diff|diff_b|diff_m))"
)
MODULATION = ".modulation"
"""End of the name of a module whose difference is a `diff_m`."""
_DOTTED_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
_FIX = "use a LoRA of this model"

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of our parameters, by path."""


class TensorMatches(NamedTuple):
    """The tensors of a file."""

    modules: dict[str, dict[ModulePart, str]]
    """Names of the tensors by module and part."""
    left_out: list[str]
    """Names of tensors for modules that only other models of the family have."""


def match_tensors(file: Path, arrays: Mapping[str, np.ndarray], shapes: Shapes, modules: LoraModules) -> TensorMatches:
    """Match the tensors of a file to modules.

    Left out are the tensors of modules that only other models of the family have, and the full difference of a kernel
    that is no linear map and has another shape: the patch embedding, whose input channels differ from model to model.

    Raises:
      UserError: tensors are missing, unexpected or misshapen.
    """
    flat = {name.replace(".", "_"): name for name in modules}
    if len(flat) != len(modules):
        raise ValueError("two modules have the same name after replacing dots by underscores")
    tensor_names: dict[str, dict[ModulePart, str]] = collections.defaultdict(dict)
    left_out: list[str] = []
    expected: dict[str, tuple[int, ...]] = {}
    for name, array in arrays.items():
        parsed = _TENSOR_NAME.fullmatch(name)
        module_name = None if parsed is None else _find_module(parsed, modules, flat)
        if parsed is None or module_name is None:
            continue
        module, part = modules[module_name], _get_part(parsed)
        if module.path is None or (part == "diff" and _is_other_embedding(module, array, shapes)):
            left_out.append(name)
        # A second tensor under another prefix is unexpected.
        elif tensor_names[module_name].setdefault(part, name) != name:
            continue
        elif part in ("a", "b"):
            expected |= _expect_factors(parsed, arrays, module, shapes)
        elif part == "alpha":
            expected[name] = array.shape if array.size == 1 else ()
        elif (shape := _get_difference_shape(module, part, shapes)) is not None:
            expected[name] = shape
    actual = {name: tuple(array.shape) for name, array in arrays.items() if name not in left_out}
    if arrays and not expected:
        raise UserError(
            f"{file} is not a LoRA of this model: none of its tensors, such as "
            f"{ours.format_names(sorted(arrays)[:3])}, belongs to one of the model's modules, such as "
            f"{ours.format_names(list(modules)[:3])}; {_FIX}"
        )
    ours.check_tensors_match(file, actual, expected, fix=_FIX)
    orphaned = [tensors["alpha"] for tensors in tensor_names.values() if "alpha" in tensors and "a" not in tensors]
    if orphaned:
        raise UserError(f"{file} has {ours.format_names(orphaned)} without the factors that they scale; {_FIX}")
    return TensorMatches(tensor_names, left_out)


def _get_part(parsed: re.Match[str]) -> ModulePart:
    if parsed["factor"] is not None:
        return "a" if parsed["factor"] in ("lora_A", "lora_down") else "b"
    kinds: dict[str, ModulePart] = {"alpha": "alpha", "diff": "diff", "diff_m": "diff", "diff_b": "diff_b"}
    return kinds[parsed["other"]]


def _find_module(parsed: re.Match[str], modules: LoraModules, flat: Mapping[str, str]) -> str | None:
    """Return the module that a tensor's name stands for, or None."""
    name = parsed["module"] + (MODULATION if parsed["other"] == "diff_m" else "")
    for prefix in _FLAT_PREFIXES:
        if name.startswith(prefix):
            return flat.get(name.removeprefix(prefix).replace(".", "_"))
    while name not in modules:
        shorter = next((name.removeprefix(prefix) for prefix in _DOTTED_PREFIXES if name.startswith(prefix)), None)
        if shorter is None:
            return None
        name = shorter
    return name


def _expect_factors(
    parsed: re.Match[str], arrays: Mapping[str, np.ndarray], module: LoraModule, shapes: Shapes
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a tensor and its counterpart; nothing for modules that have no kernel."""
    if module.path is None or not module.path.endswith("/kernel"):
        return {}
    name, is_down = parsed.string, _get_part(parsed) == "a"
    counterpart = f"{parsed['module']}.{_COUNTERPART[parsed['factor']]}{parsed['rest']}"
    a, b = (name, counterpart) if is_down else (counterpart, name)
    # The rank is that of the first factor, so that only the second is reported if they differ.
    array = arrays[name]
    rank = next(iter((array if is_down else arrays.get(counterpart, array.T)).shape), 1)
    features_in, features_out = shapes[module.path][-2], _count_outputs(module, shapes)
    if module.mapping is None:
        return {a: (rank, features_in), b: (features_out, rank)}
    down = get_their_shape(module.mapping._replace(layers=None), (features_in, rank))
    return {a: down, b: (features_out, rank, *(1,) * (len(down) - 2))}


def _get_difference_shape(module: LoraModule, part: ModulePart, shapes: Shapes) -> tuple[int, ...] | None:
    """Return the shape of a full difference in their layout; None if the module has no such parameter."""
    assert module.path is not None
    if part == "diff_b":
        has_bias = module.bias_path in shapes
        return (_count_outputs(module, shapes),) if has_bias else None
    shape = shapes[module.path]
    if module.mapping is not None:
        return get_their_shape(module.mapping, shape)
    return (_count_outputs(module, shapes), shape[-2])


def _is_other_embedding(module: LoraModule, array: np.ndarray, shapes: Shapes) -> bool:
    if module.mapping is None or module.path is None or not module.path.endswith("/kernel"):
        return False
    return array.shape != get_their_shape(module.mapping, shapes[module.path])


def _count_outputs(module: LoraModule, shapes: Shapes) -> int:
    assert module.path is not None
    return shapes[module.path][-1] if module.columns is None else module.columns[1] - module.columns[0]


def to_our_factors(module: LoraModule, a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return factors of a module as `[i, r]` and `[r, o]`, for the module's own outputs."""
    a = a.T if module.mapping is None else module.mapping.to_ours(a)
    b = b.reshape(b.shape[:2]).T
    return a, b if module.order is None else b[:, list(module.order)]


def to_our_difference(module: LoraModule, part: ModulePart, array: np.ndarray) -> np.ndarray:
    """Return a full difference in our layout, for the module's own outputs."""
    if part == "diff" and module.mapping is not None:
        return module.mapping.to_ours(array)
    return array.T if module.order is None else array.T[..., list(module.order)]


def to_their_difference(module: LoraModule, part: ModulePart, array: np.ndarray) -> np.ndarray:
    """Return a full difference in their layout; the inverse of `to_our_difference`."""
    if part == "diff" and module.mapping is not None:
        return module.mapping.to_theirs(array)
    return (array if module.order is None else array[..., np.argsort(module.order)]).T
