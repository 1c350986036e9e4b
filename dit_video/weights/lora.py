"""LoRA adapters as files, in and out, under the names that other programs use.

Three ways of naming are read, whatever the model, and written:

- `diffusers` (PEFT): `transformer.blocks.0.attn1.to_q.lora_A.weight`, with alpha in the header or in a folder's
  `adapter_config.json`; where there is none it is the rank;
- `comfyui`: `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, with a tensor `….alpha` of every module;
- `kohya`: `lora_unet_blocks_0_self_attn_q.lora_down.weight`, likewise.

Which of our kernels a module is, the caller says (`Modules`): the last two are written with the modules' names in a
model's own sources, the first with those in diffusers.
"""

import collections
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dit_video.core import trees as trees
from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.weights import safetensors as ours

Style = Literal["diffusers", "comfyui", "kohya"]
_FACTORS: dict[Style, tuple[str, str]] = {
    "diffusers": ("lora_A", "lora_B"),
    "comfyui": ("lora_down", "lora_up"),
    "kohya": ("lora_down", "lora_up"),
}
_OTHER = {"lora_A": "lora_B", "lora_B": "lora_A", "lora_down": "lora_up", "lora_up": "lora_down"}
_NAME = re.compile(
    r"(?P<module>.+)\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up)(?P<rest>(?:\.default)?\.weight)|(?P<alpha>alpha))"
)
_DOTTED = ("base_model.model.", "transformer.", "diffusion_model.")
_FLAT = ("lora_unet_", "lora_transformer_")
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_HEADER = "lora_adapter_metadata"
"""where diffusers keeps an adapter's config, under names that begin with the component's"""


class Module(NamedTuple):
    """What another project's linear map is of ours."""

    path: str
    """of our kernel"""
    layer: int | None = None
    """of a stacked one"""
    columns: tuple[int, int] | None = None
    """of one that computes several of theirs: first output, and the one after the last"""
    order: tuple[int, ...] | None = None
    """for each of our outputs which of theirs it is, where they have another order"""


Modules = Mapping[str, Module]
"""By their name; of several names of one module the first is written."""


def own_modules(params: Mapping[str, Any]) -> dict[str, Module]:
    """Our own names, of all kernels of linear maps: `dit.blocks.0.qkv` is layer 0 of `dit/blocks/qkv/kernel`.

    Args:
      params: the model's parameters, or their shapes.
    """
    found = {}
    for path, leaf in trees.flatten(params).items():
        module, stack = path.removesuffix("/kernel").replace("/", "."), re.search(r"(?:^|/)blocks(?=/)", path)
        if not path.endswith("/kernel"):
            continue
        if len(leaf.shape) == 2:
            found[module] = Module(path)
        elif len(leaf.shape) == 3 and stack is not None:
            name = f"{module[: stack.end()]}.{{}}{module[stack.end() :]}"
            found |= numbered({path: name}, params)
    return found


def numbered(names: Mapping[str, str], params: Mapping[str, Any]) -> dict[str, Module]:
    """Modules from names such as `blocks.{}.attn1.to_q`, by the path of our kernel; `{}` is the layer's number."""
    shapes = {path: leaf.shape for path, leaf in trees.flatten(params).items()}
    return {
        name.format(layer): Module(path, layer if "{}" in name else None)
        for path, name in names.items()
        for layer in (range(shapes[path][0]) if "{}" in name else [0])
    }


def load_lora(
    path: str | os.PathLike, params: Mapping[str, Any], modules: Modules, *, dtype: Any = np.float32
) -> dict[str, Any]:
    """The adapter of a file, for `merge_lora` and `attach_lora`.

    What the file leaves out is not changed. Where layers of one stack have different ranks, the smaller are filled up
    with zeros; modules that are one kernel here share its rank.

    Args:
      path: a safetensors file, or a folder of PEFT or diffusers.
      params: the model's parameters, or their shapes.
      modules: which of our kernels its modules are.
      dtype: factors are cast to it; None keeps the file's.

    Raises:
      MissingError: no such file.
      UserError: a pickled or corrupt file, one that is no LoRA of this model (tensors that are missing, unexpected or
        of another shape), or one of a kind that is not known here (DoRA).
    """
    file = _file(Path(path))
    arrays = ours.load(file, dtype=None)
    shapes = {name: tuple(leaf.shape) for name, leaf in trees.flatten(params).items()}
    found = _parsed(file, arrays, shapes, modules)
    settings = _settings(file)
    parts = collections.defaultdict(list)
    for name, tensors in found.items():
        a, b = (_cast(arrays[tensors[factor]].T, dtype) for factor in "ab")
        alpha = float(arrays[tensors["alpha"]].reshape(())) if "alpha" in tensors else None
        module = modules[name]
        b = b if module.order is None else b[:, list(module.order)]
        parts[module.path].append(_Part(module, a, b, settings.scale(name, rank=a.shape[1], alpha=alpha)))
    return trees.unflatten(
        {f"{path}/{leaf}": value for path in parts for leaf, value in _joined(shapes[path], parts[path]).items()}
    )


def save_lora(
    path: str | os.PathLike,
    lora: Mapping[str, Any],
    modules: Modules,
    *,
    style: Style = "diffusers",
    dtype: Any = None,
) -> None:
    """Write an adapter; the inverse of `load_lora`. Modules that it does not change, the others' ranks, are left out.

    Args:
      path: the file.
      lora: as `load_lora` gives it.
      modules: which of our kernels the modules are.
      style: how tensors are named.
      dtype: factors are cast to it; None keeps what they are.

    Raises:
      UserError: kernels that are no module's.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(lora).items()}
    paths = [name[:-2] for name in leaves if name.endswith("/a")]
    known = {module.path for module in modules.values()}
    if nameless := [name for name in paths if name not in known]:
        raise UserError(f"{path} has no names for adapters of {ours.listing(nameless)}; give the modules that they are")
    tensors: dict[str, np.ndarray] = {}
    alphas: dict[str, tuple[int, float]] = {}
    first, second = _FACTORS[style]
    for name, part in _divided(leaves, modules):
        rank = part.a.shape[1]
        full = f"lora_unet_{name.replace('.', '_')}" if style == "kohya" else f"{_PREFIX[style]}{name}"
        tensors |= {f"{full}.{first}.weight": _cast(part.a.T, dtype), f"{full}.{second}.weight": _cast(part.b.T, dtype)}
        alphas[name] = rank, part.scale * rank
        if style != "diffusers":
            tensors[f"{full}.alpha"] = np.asarray(part.scale * rank, np.float32)
    header = {_HEADER: _packed(alphas)} if style == "diffusers" else {}
    ours.save(path, tensors, metadata={"format": "pt", **header})


_PREFIX: dict[Style, str] = {"diffusers": "transformer.", "comfyui": "diffusion_model."}


class _Part(NamedTuple):
    """One module of theirs."""

    module: Module
    a: np.ndarray
    """`[i, r]`"""
    b: np.ndarray
    """`[r, o]`, of its own columns"""
    scale: float


class _Settings(NamedTuple):
    """What a file says of its scales."""

    alpha: float | None = None
    patterns: Mapping[str, float] = {}
    by_root: bool = False

    def scale(self, module: str, *, rank: int, alpha: float | None) -> float:
        """Of one module, whose own alpha goes first; without any alpha it is 1."""
        if alpha is None:
            matching = [value for key, value in self.patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
            alpha = next(iter(matching), self.alpha)
        return 1.0 if alpha is None else float(alpha) / (math.sqrt(rank) if self.by_root else rank)


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """A factor; alphas keep their precision."""
    return array.astype(ours.stored(array.dtype, dtype), copy=False)


def _file(path: Path) -> Path:
    """The file that is meant by a path."""
    return next((path / name for name in _FILES if (path / name).is_file()), path)


def _settings(file: Path) -> _Settings:
    """From the header, or from the config beside the file."""
    text = ours.load_metadata(file).get(_HEADER)
    try:
        given = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} has a header that is not valid JSON ({error}); write it again") from error
    if not isinstance(given, dict):
        raise UserError(f"{file} has a header whose {_HEADER} is no JSON object; write it again")
    given = {name.split(".", 1)[-1]: value for name, value in given.items()}
    if not given and file.name == _FILES[0] and (file.parent / "adapter_config.json").is_file():
        given = read_json(file.parent / "adapter_config.json")
    if given.get("use_dora"):
        raise UserError(f"{file} is a DoRA adapter; only LoRA is known here")
    return _Settings(given.get("lora_alpha"), given.get("alpha_pattern") or {}, bool(given.get("use_rslora")))


def _parsed(
    file: Path, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], modules: Modules
) -> dict[str, dict[str, str]]:
    """Names of tensors by module and by `a`, `b`, `alpha`; raises for what is missing, unexpected or misshapen."""
    flat = {name.replace(".", "_"): name for name in modules}
    if len(flat) != len(modules):
        raise ValueError("two modules have one name once their dots are underscores")
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    wanted: dict[str, tuple[int, ...]] = {}
    for name, array in arrays.items():
        parsed = _NAME.fullmatch(name)
        module = parsed and _module(parsed["module"], modules, flat)
        if not parsed or not module:
            continue
        downwards = parsed["part"] in ("lora_A", "lora_down")
        kind = "alpha" if parsed["alpha"] else "a" if downwards else "b"
        if found[module].setdefault(kind, name) != name:  # a second tensor under another prefix: unexpected
            continue
        if kind == "alpha":
            wanted[name] = array.shape if array.size == 1 else ()
            continue
        other = f"{parsed['module']}.{_OTHER[parsed['part']]}{parsed['rest']}"
        rank = next(iter((array if downwards else arrays.get(other, array.T)).shape), 1)
        place = modules[module]
        features_in, features_out = shapes[place.path][-2:]
        if place.columns is not None:
            features_out = place.columns[1] - place.columns[0]
        a, b = (name, other) if downwards else (other, name)
        wanted |= {a: (rank, features_in), b: (features_out, rank)}
    given = {name: tuple(array.shape) for name, array in arrays.items()}
    if given and not wanted:
        raise UserError(
            f"{file} holds no LoRA of this model: none of its tensors, such as {ours.listing(sorted(given)[:3])}, is "
            "of a module of it"
        )
    ours.match(file, given, wanted)
    lonely = [tensors["alpha"] for tensors in found.values() if "a" not in tensors]
    if lonely:
        raise UserError(f"{file} has {ours.listing(lonely)} without the factors that they are of")
    return found


def _module(name: str, modules: Modules, flat: Mapping[str, str]) -> str | None:
    """The module that is meant by the front of a tensor's name."""
    for prefix in _FLAT:
        if name.startswith(prefix):
            return flat.get(name.removeprefix(prefix))
    while name not in modules:
        shorter = next((name.removeprefix(prefix) for prefix in _DOTTED if name.startswith(prefix)), None)
        if shorter is None:
            return None
        name = shorter
    return name


def _joined(shape: tuple[int, ...], parts: list[_Part]) -> dict[str, np.ndarray]:
    """The factors of one of our kernels, from all modules that are of it."""
    leading, (features_in, features_out) = shape[:-2], shape[-2:]
    layers: dict[int | None, list[_Part]] = collections.defaultdict(list)
    for part in parts:
        layers[part.module.layer].append(part)
    rank = max(sum(part.a.shape[1] for part in of_layer) for of_layer in layers.values())
    a = np.zeros((*leading, features_in, rank), parts[0].a.dtype)
    b = np.zeros((*leading, rank, features_out), parts[0].b.dtype)
    scale = np.zeros(leading)
    for layer, of_layer in layers.items():
        at = () if layer is None else (layer,)
        equal = len({part.scale for part in of_layer}) == 1
        scale[at] = of_layer[0].scale if equal else 1.0
        used = 0
        for part in of_layer:
            ranks = slice(used, used := used + part.a.shape[1])
            columns = slice(*(part.module.columns or (0, features_out)))
            a[*at, :, ranks] = part.a
            b[*at, ranks, columns] = part.b if equal else (part.b * part.scale).astype(part.b.dtype)
    return {"a": a, "b": b, "scale": scale}


def _divided(leaves: Mapping[str, np.ndarray], modules: Modules) -> Iterator[tuple[str, _Part]]:
    """The modules that an adapter changes, by name."""
    written: set[Module] = set()
    for name, module in modules.items():
        if f"{module.path}/a" not in leaves or module in written:
            continue
        written.add(module)
        at = () if module.layer is None else (module.layer,)
        a, b, scale = (leaves[f"{module.path}/{leaf}"][at] for leaf in ("a", "b", "scale"))
        if not scale:
            continue
        used = (a != 0).any(axis=0) | (b != 0).any(axis=1)
        if module.columns is not None:
            own = b[:, slice(*module.columns)]
            if b.any():  # what is of its neighbours says nothing of it
                used = (own != 0).any(axis=1)
            b = own
        if not used.any():
            continue
        b = b if module.order is None else b[:, np.argsort(module.order)]
        yield name, _Part(module, a[:, used], b[used], float(scale))


def _packed(alphas: Mapping[str, tuple[int, float]]) -> str:
    """The header that diffusers hands to PEFT's `LoraConfig`: the commonest rank and alpha, and what differs."""
    ranks, usual = [rank for rank, _ in alphas.values()], [alpha for _, alpha in alphas.values()]
    rank, alpha = max(ranks, key=ranks.count, default=1), max(usual, key=usual.count, default=1)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(alphas),
        "rank_pattern": {name: own for name, (own, _) in alphas.items() if own != rank},
        "alpha_pattern": {name: own for name, (_, own) in alphas.items() if own != alpha},
    }
    return json.dumps({f"transformer.{name}": value for name, value in config.items()}, sort_keys=True)
