"""Adapters (LoRA) of a denoiser: attached beside its weights, or merged into their memory, and taken away exactly."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from dit_video.core.errors import MissingError, UserError
from dit_video.core.offload import is_in_host_memory
from dit_video.core.trees import flatten, map_with_path, unflatten
from dit_video.distributed.gather import to_host
from dit_video.nn import (
    LowRankKernel,
    attach_lora,
    get_lora_changes,
    get_mergeable_changes,
    is_kernel,
    merge_lora,
    merge_lora_in_place,
)
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.weights import get_native_modules
from dit_video.weights.lora import GetLoraModules, LoraModules, add_module_prefix, check_lora

ExpertName = Literal["backbone", "low_noise"]
_ADAPTER = re.compile(r"(.+?)(?:@(-?\d*\.?\d+)(?:@(backbone|low_noise))?)?")
_DIGEST_VALUES = 256
"""Number of values of each array that a digest is computed of."""


class Adapter(NamedTuple):
    """An adapter that is attached to a denoiser."""

    lora: Mapping[str, Any]
    """Factors and differences, where the denoiser's parameters are."""
    scale: float


class AdaptedWeights(NamedTuple):
    """The weights of a denoiser, and its adapters. Methods return new weights, which share the arrays of these."""

    params: dict[str, Any]
    """Parameters without the attached adapters, and with the merged ones."""
    adapters: Mapping[str, Adapter] = {}
    """Attached adapters by name."""
    originals: Mapping[str, Any] = {}
    """Parameters as they were before adapters were merged into them, by path: a `HostCopy`, or arrays on the host."""

    def compute_digest(self) -> str:
        """Return a hash of the first values of every array, which tells trained weights and adapters apart."""
        digest = hashlib.sha256()
        adapted = {name: (each.lora, each.scale) for name, each in self.adapters.items()}
        for path, array in jax.tree_util.tree_leaves_with_path((self.params, adapted)):
            values = np.asarray(to_host(array.ravel()[:_DIGEST_VALUES] if hasattr(array, "ravel") else array))
            digest.update(jax.tree_util.keystr(path).encode() + values.tobytes())
        return digest.hexdigest()[:16]

    def attach(self, name: str, adapter: Adapter) -> "AdaptedWeights":
        """Return the weights with a further adapter; its name gets a number if there is one of this name.

        Raises:
          UserError: If the adapter does not fit.
        """
        get_lora_changes(self.params, adapter.lora)
        numbered = (name if number == 1 else f"{name}_{number}" for number in range(1, len(self.adapters) + 2))
        free_name = next(each for each in numbered if each not in self.adapters)
        return self._replace(adapters={**self.adapters, free_name: adapter})

    def set_scales(self, scales: Mapping[str, float | int]) -> "AdaptedWeights":
        """Return the weights with other scales of some adapters.

        Raises:
          UserError: If no attached adapter has the name.
        """
        changed = {name: self._get(name)._replace(scale=float(scale)) for name, scale in scales.items()}
        return self._replace(adapters={**self.adapters, **changed})

    def detach(self, name: str) -> "AdaptedWeights":
        """Return the weights without an adapter.

        Raises:
          UserError: If no attached adapter has the name.
        """
        self._get(name)
        return self._replace(adapters={each: adapter for each, adapter in self.adapters.items() if each != name})

    def merge(self, lora: Mapping[str, Any], scale: float) -> "AdaptedWeights":
        """Return the weights with an adapter merged in place; parameters that change are copied to the host before.

        Arrays on devices that change are deleted: other weights that share them cannot be used any more.

        Raises:
          UserError: If the adapter does not fit, or changes a kernel that is not an array; then nothing changes.
        """
        leaves = flatten(self.params, is_leaf=is_kernel)
        changed = [path for path in get_mergeable_changes(self.params, lora) if path not in self.originals]
        copies = {path: _copy_to_host(leaves[path]) for path in changed}
        params = _change(merge_lora_in_place, self.params, lora, scale)
        return self._replace(params=params, originals={**self.originals, **copies})

    def restore(self) -> "AdaptedWeights":
        """Return the weights without any adapter, bit by bit as they were before the first one.

        Arrays that merging made are deleted, one after the other.
        """

        def restore_leaf(path: str, leaf: Any) -> Any:
            original = self.originals.get(path)
            if not isinstance(original, HostCopy):
                return leaf if original is None else original
            leaf.delete()
            return original.to_devices()

        return AdaptedWeights(map_with_path(restore_leaf, self.params, is_leaf=is_kernel))

    def make_sampling_params(self) -> dict[str, Any]:
        """Return the parameters for sampling: kernels that adapters change are `LowRankKernel`.

        An adapter of scale 0 is not part of them, so that the model is the one without it, bit by bit.
        """
        params = self.params
        for adapter in self._list_active():
            params = _change(attach_lora, params, adapter.lora, adapter.scale)
        return params

    def make_merged_params(self) -> dict[str, Any]:
        """Return the parameters with all adapters in them; those that change are copied.

        Raises:
          UserError: If an adapter changes a kernel that is not an array.
        """
        params = self.params
        for adapter in self._list_active():
            params = _change(merge_lora, params, adapter.lora, adapter.scale)
        return params

    def check_usable(self) -> None:
        """Check that the arrays are there.

        Raises:
          UserError: If the arrays were changed in place for other weights.
        """
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(self.params)):
            raise UserError(
                "the weights of this pipeline are deleted: an adapter was merged into them, or taken out of them, in "
                "place. Use the pipeline that load_lora(merge=True) or unload_lora returned, or load it again"
            )

    def _get(self, name: str) -> Adapter:
        if name not in self.adapters:
            fixes = [", ".join(self.adapters)] if self.adapters else []
            fixes += ["unload_lora() without a name, for adapters that are merged"] if self.originals else []
            fix = f"Use {', or '.join(fixes or ['load_lora first'])}"
            raise UserError(f"name={name!r} of an adapter is invalid: none of this name is attached. {fix}")
        return self.adapters[name]

    def _list_active(self) -> list[Adapter]:
        return [adapter for adapter in self.adapters.values() if adapter.scale != 0]


class HostCopy(NamedTuple):
    """The values of an array on devices, as far as this process has them."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: Mapping[tuple[tuple[int, int], ...], np.ndarray]
    """Values by the start and end of their part along each axis."""

    @staticmethod
    def from_array(array: jax.Array) -> "HostCopy":
        """Copy an array to the host; parts that several devices hold are copied once."""
        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for shard in array.addressable_shards:
            bounds = _get_bounds(shard.index, array.shape)
            if bounds not in parts:
                # On CPU a view would share the memory of the array, which is about to change.
                parts[bounds] = np.array(shard.data, copy=True)
        return HostCopy(array.shape, array.sharding, parts)

    def to_devices(self) -> jax.Array:
        """Return the array on the devices that it was on."""
        return jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.parts[_get_bounds(index, self.shape)]
        )


def _copy_to_host(leaf: Any) -> Any:
    """Copy an array on devices; those on the host stay as they are when an adapter is merged."""
    return HostCopy.from_array(leaf) if isinstance(leaf, jax.Array) and not is_in_host_memory(leaf) else leaf


def _change(function: Callable[..., dict[str, Any]], params: dict[str, Any], lora: Any, scale: float) -> dict[str, Any]:
    """Return `function(params, lora, scale)`, where arrays in host memory are changed on the host and put back there.

    Factors that are attached leave their kernel where it is.
    """
    changes = get_lora_changes(params, lora)
    host: dict[str, jax.Array] = {}

    def to_numpy(path: str, leaf: Any) -> Any:
        is_whole = path in changes and (function is not attach_lora or changes[path].diff is not None)
        if not is_whole or not isinstance(leaf, jax.Array) or not is_in_host_memory(leaf):
            return leaf
        host[path] = leaf
        return np.asarray(leaf)

    def put_back(path: str, leaf: Any) -> Any:
        if path not in host:
            return leaf
        if isinstance(leaf, LowRankKernel):
            return LowRankKernel(jax.device_put(leaf.kernel, host[path].sharding), leaf.factors)
        return jax.device_put(leaf, host[path].sharding)

    params = map_with_path(to_numpy, params, is_leaf=is_kernel)
    if function is not attach_lora and host:
        lora = jax.tree.map(np.asarray, lora)
    return map_with_path(put_back, function(params, lora, scale), is_leaf=is_kernel)


def _get_bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return tuple((int(start), int(stop)) for start, stop in bounds)


class AdapterFile(NamedTuple):
    """A LoRA file with its scale and the expert of two that it adapts."""

    file: Path
    scale: float
    expert: ExpertName

    @staticmethod
    def parse(text: str) -> "AdapterFile":
        """Return the adapter of `FILE`, `FILE@SCALE` or `FILE@SCALE@EXPERT`, as options of commands name it.

        Raises:
          MissingError: If the file does not exist.
          UserError: If it does, and what follows is neither a scale nor an expert.
        """
        match = _ADAPTER.fullmatch(text)
        assert match is not None  # any text is at least the name of a file
        file, scale, expert = match.groups()
        if not Path(file).exists():
            front, _, end = text.partition("@")
            if front and end and Path(front).exists():
                rule = "the file may be followed by @SCALE, or by @SCALE and @backbone or @low_noise"
                raise UserError(f"--lora {text} is invalid: {rule}. Use {front}@0.8 or {front}@0.8@low_noise")
            raise MissingError(f"no such file: {file} of --lora {text}; use FILE, FILE@SCALE or FILE@SCALE@EXPERT")
        return AdapterFile(Path(file), float(scale or 1), "low_noise" if expert == "low_noise" else "backbone")


def check_adapter(
    path: str | Path, config: PipelineConfig, get_lora_modules: GetLoraModules, *, expert: ExpertName = "backbone"
) -> None:
    """Check that `load_lora` of a pipeline would accept an adapter, by the file's header, before weights are read.

    Args:
      path: A safetensors file, or a folder.
      config: Config of the pipeline.
      get_lora_modules: Names of modules in LoRA files of other projects, from the denoiser's config.
      expert: Expert of two that is adapted.

    Raises:
      MissingError: If there is no file at `path`.
      UserError: If the file is no LoRA of this model, or the model has no second expert.
    """
    shapes = config.denoiser_shapes
    check_lora(path, shapes, list_lora_modules(config, shapes, get_lora_modules, expert))


def list_lora_modules(
    config: PipelineConfig, params: Mapping[str, Any], get_lora_modules: GetLoraModules, expert: ExpertName
) -> LoraModules:
    """Return the modules of an expert that adapters change, by their names in files.

    Raises:
      UserError: If the model has no second expert.
    """
    if expert not in params:
        raise UserError(f"expert={expert!r} is invalid: this model has one expert; leave out expert")
    modules = add_module_prefix(get_lora_modules(config.model.backbone), expert)
    return get_native_modules(params) | modules


def split_factors(lora: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the factors of an adapter, in the dtype of their kernels, and its other leaves by path.

    Factors are multiplied in that dtype. Scales and differences stay on the host: they are small, and only needed when
    a scale is set.
    """
    kernels, leaves = flatten(params, is_leaf=is_kernel), flatten(lora)
    factors = {
        path: leaf.astype(kernels[path[:-2]].dtype) for path, leaf in leaves.items() if path.endswith(("/a", "/b"))
    }
    return unflatten(factors), {path: leaf for path, leaf in leaves.items() if path not in factors}
