"""LoRA adapters in files, under the names that other programs use.

Three styles of names are read, for any model, and written:

- `diffusers` (PEFT): `transformer.blocks.0.attn1.to_q.lora_A.weight`, with alpha in the header or in a folder's
  `adapter_config.json`; by default alpha is the rank;
- `comfyui`: `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, with a tensor `….alpha` for each module;
- `kohya`: `lora_unet_blocks_0_self_attn_q.lora_down.weight`, with the same tensors.

The caller maps modules to our kernels (`LoraModules`): `comfyui` and `kohya` use the names of modules in a model's own
sources, `diffusers` those in diffusers.
"""

import collections
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dit_video.core import trees as trees
from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.weights import safetensors as ours

NamingStyle = Literal["diffusers", "comfyui", "kohya"]
_STYLES: dict[NamingStyle, tuple[str, str, str]] = {
    "diffusers": ("transformer.", "lora_A", "lora_B"),
    "comfyui": ("diffusion_model.", "lora_down", "lora_up"),
    "kohya": ("lora_unet_", "lora_down", "lora_up"),
}
_COUNTERPART = {"lora_A": "lora_B", "lora_B": "lora_A", "lora_down": "lora_up", "lora_up": "lora_down"}
_TENSOR_NAME = re.compile(
    r"(?P<module>.+)\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up)(?P<rest>(?:\.default)?\.weight)|(?P<alpha>alpha))"
)
_DOTTED_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_METADATA_KEY = "lora_adapter_metadata"
"""Metadata key of an adapter's config in diffusers' files; its keys begin with the component's name."""


class LoraModule(NamedTuple):
    """The kernel of ours that another project's linear map corresponds to."""

    path: str
    """Path of our kernel."""
    layer: int | None = None
    """Layer of a stacked kernel."""
    columns: tuple[int, int] | None = None
    """Output columns, as start and end, of a kernel that computes several linear maps of theirs."""
    order: tuple[int, ...] | None = None
    """Index of their output for each of ours, if they are ordered differently."""


LoraModules = Mapping[str, LoraModule]
"""Modules by their name; if a module has several names, the first is written."""


GetLoraModules = Callable[[Any], Mapping[str, LoraModule]]
"""Function from a denoiser's config to the linear maps that its family's LoRA files adapt, by their names there."""


def no_lora_modules(config: Any) -> Mapping[str, LoraModule]:
    """Return no linear maps: those of a model whose LoRA files have native names only."""
    return {}


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


def load_lora(
    path: str | os.PathLike, params: Mapping[str, Any], modules: LoraModules, *, dtype: Any = np.float32
) -> dict[str, Any]:
    """Read the adapter in a file, for `merge_lora` and `attach_lora`.

    Kernels that the file omits are not changed. If layers of a stack have different ranks, the smaller ones are padded
    with zeros; modules that are one kernel here share its rank.

    Args:
      path: a safetensors file, or a folder of PEFT or diffusers.
      params: the model's parameters, or their shapes.
      modules: the kernels that the file's modules correspond to.
      dtype: dtype that factors are cast to; None keeps the file's.

    Raises:
      MissingError: the file does not exist.
      UserError: the file is pickled or corrupt, is not a LoRA of this model (tensors are missing, unexpected or of
        another shape), or is of an unsupported kind (DoRA).
    """
    path = Path(path)
    file = next((path / name for name in _FILES if (path / name).is_file()), path)
    arrays = ours.load(file, dtype=None)
    shapes = {name: tuple(leaf.shape) for name, leaf in trees.flatten(params).items()}
    matches = _match_tensors(file, arrays, shapes, modules)
    settings = _read_settings(file)
    parts = collections.defaultdict(list)
    for name, tensors in matches.items():
        a, b = (_cast(arrays[tensors[factor]].T, dtype) for factor in "ab")
        alpha = float(arrays[tensors["alpha"]].reshape(())) if "alpha" in tensors else None
        module = modules[name]
        b = b if module.order is None else b[:, list(module.order)]
        parts[module.path].append(_ModuleFactors(module, a, b, settings.get_scale(name, rank=a.shape[1], alpha=alpha)))
    return trees.unflatten(
        {f"{path}/{leaf}": value for path in parts for leaf, value in _join_factors(shapes[path], parts[path]).items()}
    )


def save_lora(
    path: str | os.PathLike,
    lora: Mapping[str, Any],
    modules: LoraModules,
    *,
    style: NamingStyle = "diffusers",
    dtype: Any = None,
) -> None:
    """Write an adapter; the inverse of `load_lora`.

    Modules that it does not change, and ranks that only other layers use, are omitted.

    Args:
      path: the file.
      lora: adapter as `load_lora` returns it.
      modules: the modules that our kernels correspond to.
      style: style of the tensors' names.
      dtype: dtype that factors are cast to; None keeps theirs.

    Raises:
      UserError: the adapter has kernels that correspond to no module.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(lora).items()}
    paths = [name[:-2] for name in leaves if name.endswith("/a")]
    mapped = {module.path for module in modules.values()}
    if unmapped := [name for name in paths if name not in mapped]:
        raise UserError(
            f"{path}: no names for adapters of {ours.format_names(unmapped)}. Use modules= with these kernels"
        )
    tensors: dict[str, np.ndarray] = {}
    alphas: dict[str, tuple[int, float]] = {}
    start, first, second = _STYLES[style]
    for name, part in _split_factors(leaves, modules):
        rank = part.a.shape[1]
        prefix = start + (name.replace(".", "_") if style == "kohya" else name)
        tensors[f"{prefix}.{first}.weight"] = _cast(part.a.T, dtype)
        tensors[f"{prefix}.{second}.weight"] = _cast(part.b.T, dtype)
        alphas[name] = rank, part.scale * rank
        if style != "diffusers":
            tensors[f"{prefix}.alpha"] = np.asarray(part.scale * rank, np.float32)
    header = {_METADATA_KEY: _make_metadata(alphas)} if style == "diffusers" else {}
    ours.save(path, tensors, metadata={"format": "pt", **header})


class _ModuleFactors(NamedTuple):
    """The factors of one of their modules."""

    module: LoraModule
    a: np.ndarray
    """First factor, `[i, r]`."""
    b: np.ndarray
    """Second factor, `[r, o]`, for the module's own columns."""
    scale: float


class _ScaleSettings(NamedTuple):
    """The scales of a file's modules."""

    alpha: float | None = None
    alpha_patterns: Mapping[str, float] = {}
    is_rank_stabilized: bool = False

    def get_scale(self, module: str, *, rank: int, alpha: float | None) -> float:
        """Return the scale of one module, whose own alpha takes precedence; without any alpha it is 1."""
        if alpha is None:
            matching = [value for key, value in self.alpha_patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
            alpha = next(iter(matching), self.alpha)
        return 1.0 if alpha is None else float(alpha) / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Cast a factor; alphas keep their precision."""
    return array.astype(ours.cast_dtype(array.dtype, dtype), copy=False)


def _read_settings(file: Path) -> _ScaleSettings:
    """Read the scales from the header, or from the config next to the file."""
    text = ours.load_metadata(file).get(_METADATA_KEY)
    try:
        config = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} has a header that is not valid JSON ({error}). Write the file again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} has a header whose {_METADATA_KEY} is not a JSON object. Write the file again")
    config = {name.split(".", 1)[-1]: value for name, value in config.items()}
    if not config and file.name == _FILES[0] and (file.parent / "adapter_config.json").is_file():
        config = read_json(file.parent / "adapter_config.json")
    if config.get("use_dora"):
        raise UserError(f"{file} is a DoRA adapter, which is not supported. Use a LoRA")
    return _ScaleSettings(config.get("lora_alpha"), config.get("alpha_pattern") or {}, bool(config.get("use_rslora")))


def _match_tensors(
    file: Path, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], modules: LoraModules
) -> dict[str, dict[str, str]]:
    """Return the names of tensors by module and by `a`, `b`, `alpha`.

    Raises:
      UserError: tensors are missing, unexpected or misshapen.
    """
    flat = {name.replace(".", "_"): name for name in modules}
    if len(flat) != len(modules):
        raise ValueError("two modules have the same name after replacing dots by underscores")
    tensor_names: dict[str, dict[str, str]] = collections.defaultdict(dict)
    expected: dict[str, tuple[int, ...]] = {}
    for name, array in arrays.items():
        parsed = _TENSOR_NAME.fullmatch(name)
        module = parsed and _find_module(parsed["module"], modules, flat)
        if not parsed or not module:
            continue
        is_down = parsed["part"] in ("lora_A", "lora_down")
        kind = "alpha" if parsed["alpha"] else "a" if is_down else "b"
        if tensor_names[module].setdefault(kind, name) != name:  # A second tensor under another prefix is unexpected.
            continue
        if kind == "alpha":
            expected[name] = array.shape if array.size == 1 else ()
            continue
        counterpart = f"{parsed['module']}.{_COUNTERPART[parsed['part']]}{parsed['rest']}"
        # The rank is that of the first factor, so that only the second is reported if they differ.
        rank = next(iter((array if is_down else arrays.get(counterpart, array.T)).shape), 1)
        target = modules[module]
        features_in, features_out = shapes[target.path][-2:]
        if target.columns is not None:
            features_out = target.columns[1] - target.columns[0]
        a, b = (name, counterpart) if is_down else (counterpart, name)
        expected |= {a: (rank, features_in), b: (features_out, rank)}
    actual = {name: tuple(array.shape) for name, array in arrays.items()}
    if actual and not expected:
        raise UserError(
            f"{file} is not a LoRA of this model: none of its tensors, such as "
            f"{ours.format_names(sorted(actual)[:3])}, belongs to one of the model's modules"
        )
    ours.check_tensors_match(file, actual, expected)
    orphaned = [tensors["alpha"] for tensors in tensor_names.values() if "a" not in tensors]
    if orphaned:
        raise UserError(f"{file} has {ours.format_names(orphaned)} without the factors that they scale")
    return tensor_names


def _find_module(name: str, modules: LoraModules, flat: Mapping[str, str]) -> str | None:
    """Return the module that the front of a tensor's name stands for, or None."""
    for prefix in _FLAT_PREFIXES:
        if name.startswith(prefix):
            return flat.get(name.removeprefix(prefix))
    while name not in modules:
        shorter = next((name.removeprefix(prefix) for prefix in _DOTTED_PREFIXES if name.startswith(prefix)), None)
        if shorter is None:
            return None
        name = shorter
    return name


def _join_factors(shape: tuple[int, ...], parts: list[_ModuleFactors]) -> dict[str, np.ndarray]:
    """Return the factors of one of our kernels, from all modules that correspond to it."""
    leading, (features_in, features_out) = shape[:-2], shape[-2:]
    layers: dict[int | None, list[_ModuleFactors]] = collections.defaultdict(list)
    for part in parts:
        layers[part.module.layer].append(part)
    rank = max(sum(part.a.shape[1] for part in layer_parts) for layer_parts in layers.values())
    a = np.zeros((*leading, features_in, rank), parts[0].a.dtype)
    b = np.zeros((*leading, rank, features_out), parts[0].b.dtype)
    scale = np.zeros(leading)
    for layer, layer_parts in layers.items():
        index = () if layer is None else (layer,)
        # Modules that share a kernel occupy ranks and columns of their own. A kernel has one scale, so that different
        # scales are multiplied into `b`.
        same_scale = len({part.scale for part in layer_parts}) == 1
        scale[index] = layer_parts[0].scale if same_scale else 1.0
        rank_start = 0
        for part in layer_parts:
            ranks = slice(rank_start, rank_start := rank_start + part.a.shape[1])
            columns = slice(*(part.module.columns or (0, features_out)))
            a[*index, :, ranks] = part.a
            b[*index, ranks, columns] = part.b if same_scale else (part.b * part.scale).astype(part.b.dtype)
    return {"a": a, "b": b, "scale": scale}


def _split_factors(leaves: Mapping[str, np.ndarray], modules: LoraModules) -> Iterator[tuple[str, _ModuleFactors]]:
    """Yield the modules that an adapter changes, with their names; the inverse of `_join_factors`."""
    written: set[LoraModule] = set()
    for name, module in modules.items():
        if f"{module.path}/a" not in leaves or module in written:
            continue
        written.add(module)
        index = () if module.layer is None else (module.layer,)
        a, b, scale = (leaves[f"{module.path}/{leaf}"][index] for leaf in ("a", "b", "scale"))
        if not scale:
            continue
        used = (a != 0).any(axis=0) | (b != 0).any(axis=1)
        if module.columns is not None:
            module_b = b[:, slice(*module.columns)]
            if b.any():  # The ranks of other modules have zeros in these columns.
                used = (module_b != 0).any(axis=1)
            b = module_b
        if not used.any():
            continue
        b = b if module.order is None else b[:, np.argsort(module.order)]
        yield name, _ModuleFactors(module, a[:, used], b[used], float(scale))


def _make_metadata(alphas: Mapping[str, tuple[int, float]]) -> str:
    """Return the header that diffusers passes to PEFT's `LoraConfig`: the commonest rank and alpha, and exceptions."""
    ranks, values = [rank for rank, _ in alphas.values()], [alpha for _, alpha in alphas.values()]
    rank, alpha = max(ranks, key=ranks.count, default=1), max(values, key=values.count, default=1)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(alphas),
        "rank_pattern": {name: entry for name, (entry, _) in alphas.items() if entry != rank},
        "alpha_pattern": {name: entry for name, (_, entry) in alphas.items() if entry != alpha},
    }
    return json.dumps({f"transformer.{name}": value for name, value in config.items()}, sort_keys=True)
