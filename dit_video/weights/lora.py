"""LoRA adapters in files, under the names that other programs use.

Three styles of names are read, for any model, and written:

- `diffusers` (PEFT): `transformer.blocks.0.attn1.to_q.lora_A.weight`, with alpha in the header or in a folder's
  `adapter_config.json`; by default alpha is the rank. PEFT may add the adapter's name: `….lora_A.default.weight`;
- `comfyui`: `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, with a tensor `….alpha` for each module;
- `kohya`: `lora_unet_blocks_0_self_attn_q.lora_down.weight`, with the same tensors; LyCORIS writes `lycoris_…`.

Files may also hold full differences of weights and biases; those of `diffusers` only biases of the second factor. The
caller maps modules to our parameters (`LoraModules`): `comfyui` and `kohya` use the names of modules in a model's own
sources, `diffusers` its own.
"""

import collections
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dit_video.core import trees
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.nn import is_kernel
from dit_video.weights import safetensors as ours
from dit_video.weights.tensor_map import TensorMapping, get_their_shape

_BIASES = {"kernel": "bias", "scale": "shift"}


class LoraModule(NamedTuple):
    """Our parameters that correspond to another project's module: a linear map, a norm or a table."""

    path: str | None
    """Path of our kernel, scale or table; None if only other models of the family, whose files are read too, have
    it."""
    layer: int | None = None
    """Layer of a stacked parameter."""
    columns: tuple[int, int] | None = None
    """Start and end of the module's output columns in a kernel that computes several of their linear maps."""
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


NATIVE_PARTS = ("backbone", "low_noise", "text")
"""Parts of a pipeline's denoiser, with which native names of modules begin."""


def no_lora_modules(config: Any) -> Mapping[str, LoraModule]:
    """Return no modules, for a model whose LoRA files have native names only."""
    return {}


def add_module_prefix(modules: LoraModules, prefix: str) -> dict[str, LoraModule]:
    """Return the modules of a model whose parameters have a prefix, such as `backbone`, in a pipeline."""
    return {
        name: module if module.path is None else module._replace(path=f"{prefix}/{module.path}")
        for name, module in modules.items()
    }


def get_native_modules(params: Mapping[str, Any]) -> dict[str, LoraModule]:
    """Return the modules of all linear maps' kernels, under native names.

    For example, `backbone.blocks.0.qkv` is layer 0 of `backbone/blocks/qkv/kernel`.

    Args:
      params: The model's parameters, or their shapes.
    """
    modules = {}
    for path, leaf in trees.flatten(params, is_leaf=is_kernel).items():
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
    shapes = _get_shapes(params)
    return {
        name.format(layer): LoraModule(path, layer if "{}" in name else None)
        for path, name in names.items()
        for layer in (range(shapes[path][0]) if "{}" in name else [0])
    }


ModulePart = Literal["a", "b", "b_bias", "alpha", "diff", "diff_b"]
"""Part of a module that a tensor holds."""
_DIFFERENCES: tuple[ModulePart, ...] = ("diff", "diff_b")
_COUNTERPART = {"lora_A": "lora_B", "lora_B": "lora_A", "lora_down": "lora_up", "lora_up": "lora_down"}
_TENSOR_NAME = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<factor>lora_A|lora_B|lora_down|lora_up)(?P<rest>(?:\.[^.]+)?\.weight)"
    r"|(?P<bias>lora_B|lora_up)(?:\.[^.]+)?\.bias|(?P<other>alpha|diff|diff_b|diff_m))"
)
_OTHER_ADAPTERS = {
    "DoRA": r"\.dora_scale|\.lora_magnitude_vector(\..*)?",
    "LoKr": r"\.lokr_(w|t)\d.*",
    "LoHa": r"\.hada_(w|t)\d.*",
    "LoCon with a core tensor": r"\.lora_mid\.weight",
    "VeRA": r"\.vera_(A|B|lambda_[bd])(\..*)?",
    "AdaLoRA": r"\.(lora_E|ranknum)(\..*)?",
    "OFT": r"\.oft_.*",
    "BOFT": r"\.boft_(R|s)(\..*)?",
    "IA3": r"\.(ia3_l|on_input)(\..*)?",
    "GLoRA": r"\.(a1|a2|b1|b2)\.weight",
}
"""Ends of the names of tensors by the kind of adapter that has them (PEFT and LyCORIS)."""
MODULATION = ".modulation"
"""End of the name of a module whose difference is a `diff_m`."""
_DOTTED_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
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

    Two kinds of tensors are left out. The first belong to modules that only other models of the family have. The second
    is the full difference of a kernel that is not a linear map and has another shape: the patch embedding, whose input
    channels differ from model to model.

    Raises:
      UserError: If there are no tensors, they are those of another kind of adapter, or some are missing, unexpected or
        misshapen.
    """
    if not arrays:
        raise UserError(f"{file} has no tensors. Write it again, or {_FIX}")
    for kind, ending in _OTHER_ADAPTERS.items():
        if name := next((name for name in arrays if re.search(f"(?:{ending})$", name)), None):
            raise _make_kind_error(file, kind, name)
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
    if not expected:
        # Names of the family's files, as this is one, rather than ours; the closest ones are in the file's own style.
        own = [name for name, module in modules.items() if module.path is not None]
        names = [name for name in own if name.partition(".")[0] not in NATIVE_PARTS] or own
        raise UserError(
            f"{file} is not a LoRA of this model: none of its tensors, such as "
            f"{ours.format_names(sorted(arrays)[:3])}, belongs to one of the model's modules, such as "
            f"{trees.find_closest(sorted(arrays)[0], names)}; {_FIX}"
        )
    ours.check_tensors_match(file, actual, expected, fix=_FIX)
    scaled: tuple[ModulePart, ...] = ("alpha", "b_bias")
    orphaned = [
        tensors[part] for tensors in tensor_names.values() for part in scaled if part in tensors and "a" not in tensors
    ]
    if orphaned:
        raise UserError(f"{file} has {ours.format_names(orphaned)} without the factors that they scale; {_FIX}")
    return TensorMatches(tensor_names, left_out)


def _make_kind_error(file: Path, kind: str, sign: str) -> UserError:
    """Return the error for another kind of adapter, which has a tensor or a setting, its sign."""
    fix = "Use a LoRA, or a model into which the adapter is merged"
    return UserError(f"{file} is a {kind} adapter, as it has {sign}, which is not supported. {fix}")


def _get_part(parsed: re.Match[str]) -> ModulePart:
    if parsed["factor"] is not None:
        return "a" if parsed["factor"] in ("lora_A", "lora_down") else "b"
    if parsed["bias"] is not None:
        return "b_bias"
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
    # The first factor sets the rank, so only the second is reported if they differ.
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
    if part != "diff":  # of the bias
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


def to_their_factors(module: LoraModule, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return factors of a module in their layout; the inverse of `to_our_factors`."""
    b = b.T if module.order is None else b[:, np.argsort(module.order)].T
    if module.mapping is None:
        return a.T, b
    down = module.mapping._replace(layers=None).to_theirs(a)
    return down, b.reshape(*b.shape, *(1,) * (down.ndim - 2))


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


NamingStyle = Literal["diffusers", "comfyui", "kohya"]
_STYLES: dict[NamingStyle, tuple[str, str, str]] = {
    "diffusers": ("transformer.", "lora_A", "lora_B"),
    "comfyui": ("diffusion_model.", "lora_down", "lora_up"),
    "kohya": ("lora_unet_", "lora_down", "lora_up"),
}
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_METADATA_KEY = "lora_adapter_metadata"
"""Metadata key of an adapter's config in diffusers' files; its keys begin with the component's name."""


def load_lora(
    path: str | os.PathLike, params: Mapping[str, Any], modules: LoraModules, *, dtype: Any = np.float32
) -> dict[str, Any]:
    """Read the adapter in a file, for `merge_lora` and `attach_lora`.

    Tensors of modules that only other models of the family have are left out, such as those for image tokens in a LoRA
    of Wan's I2V; a warning names those that are not zero. Parameters that the file omits are not changed. If layers of
    a stack have different ranks, the smaller ones are padded with zeros; modules that are one kernel here share its
    rank.

    Args:
      path: A safetensors file, or a folder of PEFT or diffusers.
      params: The model's parameters, or their shapes.
      modules: The parameters that the file's modules correspond to.
      dtype: Dtype that factors and differences are cast to; None keeps the file's.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled or corrupt, is not a LoRA for this model (tensors are missing, unexpected or of
        another shape), or is of an unsupported kind (DoRA, LoKr, LoHa …).
    """
    file = _find_file(Path(path))
    settings, arrays, shapes = _read_settings(file), ours.load(file, dtype=None), _get_shapes(params)
    matches, left_out = match_tensors(file, arrays, shapes, modules)
    if left_out := [name for name in left_out if arrays[name].any()]:
        names = ours.format_names(left_out)
        warnings.warn(
            f"{file}: {len(left_out)} tensors are left out, as they change what this model lacks: {names}", stacklevel=2
        )
    factors: dict[str, list[_ModuleFactors]] = collections.defaultdict(list)
    leaves: dict[str, np.ndarray] = {}
    for name, tensors in matches.items():
        module = modules[name]
        parts = {part: _cast(arrays[tensor], dtype) for part, tensor in tensors.items() if part != "alpha"}
        differences = [(part, parts[part]) for part in _DIFFERENCES if part in parts]
        if "a" in parts:
            a, b = to_our_factors(module, parts["a"], parts["b"])
            alpha = float(arrays[tensors["alpha"]].reshape(())) if "alpha" in tensors else None
            scale = settings.get_scale(name, rank=a.shape[1], alpha=alpha)
            factors[str(module.path)].append(_ModuleFactors(module, a, b, scale))
            if "b_bias" in parts:  # of the second factor, in PEFT
                differences.append(("diff_b", (parts["b_bias"] * scale).astype(parts["b_bias"].dtype)))
        for part, change in differences:
            changed = str(module.path if part == "diff" else module.bias_path)
            diff = leaves.setdefault(f"{changed}/diff", np.zeros(shapes[changed], change.dtype))
            diff[_get_index(module)] += to_our_difference(module, part, change)
    for kernel, module_factors in factors.items():
        leaves |= {f"{kernel}/{leaf}": value for leaf, value in _join_factors(shapes[kernel], module_factors).items()}
    return trees.unflatten(leaves)


def check_lora(path: str | os.PathLike, params: Mapping[str, Any], modules: LoraModules) -> None:
    """Check by the file's header that `load_lora` would read an adapter; arguments and errors are the same."""
    file = _find_file(Path(path))
    # Only shapes are compared, and a zero that is broadcast to a shape takes no memory.
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in ours.load_shapes(file).items()}
    _read_settings(file)
    match_tensors(file, arrays, _get_shapes(params), modules)


def is_lora_file(path: Path) -> bool:
    """Return whether a safetensors file, or the one in a folder of PEFT or diffusers, has factors of an adapter."""
    file = _find_known_file(path) or path
    return file.is_file() and file.suffix == ".safetensors" and any(".lora_" in name for name in ours.load_shapes(file))


def _find_known_file(folder: Path) -> Path | None:
    """Return the file in a folder of PEFT or diffusers; None if there is none."""
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def _find_file(path: Path) -> Path:
    """Return the file of an adapter, which may be in a folder, alone or under a name of PEFT or diffusers.

    Raises:
      MissingError: If the folder has no such file.
    """
    if not path.is_dir():
        return path
    if (known := _find_known_file(path)) is not None:
        return known
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} safetensors files" if files else "no safetensors file"
    raise MissingError(f"{path} has {found}, and an adapter is one. Use the path of the file")


def _get_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in trees.flatten(params, is_leaf=is_kernel).items()}


def save_lora(
    path: str | os.PathLike,
    lora: Mapping[str, Any],
    modules: LoraModules,
    *,
    style: NamingStyle = "diffusers",
    dtype: Any = None,
) -> None:
    """Write an adapter; the inverse of `load_lora`.

    Modules that it does not change, and ranks that only other layers use, are omitted. Of full differences, diffusers
    has names only for those of the biases of modules that have factors.

    Args:
      path: The file.
      lora: Adapter as `load_lora` returns it.
      modules: The modules that our kernels correspond to.
      style: Style of the tensors' names.
      dtype: Dtype that factors and differences are cast to; None keeps theirs.

    Raises:
      UserError: If the adapter has parameters that correspond to no module, or full differences without a name in the
        style.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(lora).items()}
    factors, differences = dict(_split_factors(leaves, modules)), list(_split_differences(leaves, modules))
    mapped = {f"{module.path}/a" for module in modules.values()}
    mapped |= {f"{path}/diff" for module in modules.values() for path in (module.path, module.bias_path)}
    if style == "diffusers":
        for name, difference, _ in differences:
            if difference == "diff" or name not in factors:
                mapped.discard(f"{modules[name].path if difference == 'diff' else modules[name].bias_path}/diff")
    changed = [name for name in leaves if name.endswith(("/a", "/diff"))]
    if unmapped := [name.rpartition("/")[0] for name in changed if name not in mapped]:
        fix = "Use layout dit_video of convert.py, or modules= with these kernels, for our own names"
        if style == "diffusers" and any(name.endswith("/diff") for name in changed):
            fix = "Use style='comfyui', which has names for full differences (layout authors of convert.py)"
        raise UserError(f"{path}: no names for adapters of {ours.format_names(unmapped)}. {fix}")
    tensors: dict[str, np.ndarray] = {}
    alphas: dict[str, tuple[int, float]] = {}
    _, first, second = _STYLES[style]
    for name, difference, array in differences:
        is_modulation = name.endswith(MODULATION)
        prefix = _add_prefix(style, name.removesuffix(MODULATION))
        if style == "diffusers":  # the bias of the second factor, which has the factors' scale
            array = (array / factors[name].scale).astype(array.dtype)
            tensors[f"{prefix}.{second}.bias"] = _cast(array, dtype)
        else:
            tensors[f"{prefix}.{'diff_m' if is_modulation else difference}"] = _cast(array, dtype)
    for name, part in factors.items():
        rank, prefix = part.a.shape[1], _add_prefix(style, name)
        a, b = to_their_factors(part.module, part.a, part.b)
        tensors[f"{prefix}.{first}.weight"], tensors[f"{prefix}.{second}.weight"] = _cast(a, dtype), _cast(b, dtype)
        alphas[name] = rank, part.scale * rank
        if style != "diffusers":
            tensors[f"{prefix}.alpha"] = np.asarray(part.scale * rank, np.float32)
    metadata = _make_metadata(alphas, has_biases=bool(differences))
    header = {_METADATA_KEY: metadata} if style == "diffusers" else {}
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


def _add_prefix(style: NamingStyle, name: str) -> str:
    return _STYLES[style][0] + (name.replace(".", "_") if style == "kohya" else name)


def _get_index(module: LoraModule) -> tuple[Any, ...]:
    """Return the index of a module in the parameter that it is a part of."""
    layer = () if module.layer is None else (module.layer,)
    return (*layer, ..., slice(*(module.columns or (None,))))


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Cast a factor; alphas keep their precision."""
    return array.astype(ours.cast_dtype(array.dtype, dtype), copy=False)


def _read_settings(file: Path) -> _ScaleSettings:
    """Read the scales from the header, or from the config next to the file.

    Raises:
      UserError: If they are no JSON object, or those of another kind of adapter.
    """
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
        raise _make_kind_error(file, "DoRA", "use_dora")
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise _make_kind_error(file, kind, f"peft_type={kind}")
    return _ScaleSettings(config.get("lora_alpha"), config.get("alpha_pattern") or {}, bool(config.get("use_rslora")))


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
        # Modules that share a kernel have their own ranks and columns. A kernel has one scale, so different scales are
        # multiplied into `b`.
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
        yield name, _ModuleFactors(module, a[:, used], b[used], float(scale))


def _split_differences(
    leaves: Mapping[str, np.ndarray], modules: LoraModules
) -> Iterator[tuple[str, ModulePart, np.ndarray]]:
    """Yield the full differences that are not zero, in their layout, each with its module and part."""
    written: set[tuple[Any, ...]] = set()
    for name, module in modules.items():
        for part, path in zip(_DIFFERENCES, (module.path, module.bias_path), strict=True):
            target = (path, module.layer, module.columns)
            if f"{path}/diff" not in leaves or target in written:
                continue
            written.add(target)
            if (diff := leaves[f"{path}/diff"][_get_index(module)]).any():
                yield name, part, to_their_difference(module, part, diff)


def _make_metadata(alphas: Mapping[str, tuple[int, float]], *, has_biases: bool) -> str:
    """Return the header that diffusers passes to PEFT's `LoraConfig`: the commonest rank and alpha, and exceptions."""
    ranks, values = [rank for rank, _ in alphas.values()], [alpha for _, alpha in alphas.values()]
    rank, alpha = max(ranks, key=ranks.count, default=1), max(values, key=values.count, default=1)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(alphas),
        "rank_pattern": {name: entry for name, (entry, _) in alphas.items() if entry != rank},
        "alpha_pattern": {name: entry for name, (_, entry) in alphas.items() if entry != alpha},
        **({"lora_bias": True} if has_biases else {}),
    }
    return json.dumps({f"transformer.{name}": value for name, value in config.items()}, sort_keys=True)
