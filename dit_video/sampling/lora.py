"""Adapters (LoRA) of a pipeline's denoiser."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from dit_video.core.errors import MissingError, UserError
from dit_video.core.offload import Offload
from dit_video.core.trees import flatten, unflatten
from dit_video.sampling import Denoiser
from dit_video.sampling.adapters import AdaptedWeights, Adapter
from dit_video.sampling.devices import PipelineDevices
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.weights import get_native_modules, load_lora
from dit_video.weights.lora import GetLoraModules, LoraModules, add_module_prefix, check_lora

ExpertName = Literal["backbone", "low_noise"]
_ADAPTER = re.compile(r"(.+?)(?:@(-?\d*\.?\d+)(?:@(backbone|low_noise))?)?")
LoraLoaderT = TypeVar("LoraLoaderT", bound="LoraLoader")


class AdapterFile(NamedTuple):
    """A LoRA file with its scale and the expert of two that it adapts."""

    file: Path
    scale: float
    expert: ExpertName

    @staticmethod
    def parse(text: str) -> "AdapterFile":
        """Return the adapter of `FILE`, `FILE@SCALE` or `FILE@SCALE@EXPERT`, as options of commands name it.

        Raises:
          MissingError: no such file.
        """
        match = _ADAPTER.fullmatch(text)
        assert match is not None  # any text is at least the name of a file
        file, scale, expert = match.groups()
        if not Path(file).exists():
            raise MissingError(f"no such file: {file} of --lora {text}; use FILE, FILE@SCALE or FILE@SCALE@EXPERT")
        return AdapterFile(Path(file), float(scale or 1), "low_noise" if expert == "low_noise" else "backbone")


def check_adapter(
    path: str | Path, config: PipelineConfig, get_lora_modules: GetLoraModules, *, expert: ExpertName = "backbone"
) -> None:
    """Check that `load_lora` of a pipeline would accept an adapter, by the file's header, before weights are read.

    Args:
      path: a safetensors file, or a folder.
      config: config of the pipeline.
      get_lora_modules: names of modules in LoRA files of other projects, from the denoiser's config.
      expert: expert of two that is adapted.

    Raises:
      MissingError: no file at `path`.
      UserError: a file that is not a LoRA of this model, or a second expert that the model does not have.
    """
    shapes = config.denoiser_shapes
    check_lora(path, shapes, _list_modules(config, shapes, get_lora_modules, expert))


def _list_modules(
    config: PipelineConfig, params: Mapping[str, Any], get_lora_modules: GetLoraModules, expert: ExpertName
) -> LoraModules:
    """Return the modules of an expert that adapters change, by their names in files.

    Raises:
      UserError: a second expert that the model does not have.
    """
    if expert not in params:
        raise UserError(f"expert={expert!r} is invalid: this model has one expert; leave out expert")
    modules = add_module_prefix(get_lora_modules(config.backbone), expert)
    return get_native_modules(params) | modules


class LoraLoader:
    """The part of a pipeline that loads adapters and takes them away."""

    config: PipelineConfig
    _denoiser: Denoiser
    _devices: PipelineDevices
    _get_lora_modules: GetLoraModules
    _offload: Offload | None
    _weights: AdaptedWeights

    def load_lora(
        self: LoraLoaderT,
        path: str | Path,
        scale: float | int = 1.0,
        *,
        expert: ExpertName = "backbone",
        name: str | None = None,
        merge: bool = False,
    ) -> LoraLoaderT:
        """Return the same pipeline with an adapter, which shares its weights with this one; this one is unchanged.

        Calls are chained for several adapters: `pipe.load_lora(style, 0.8).load_lora(motion, 0.5)`. An adapter is
        attached: its factors are kept beside the weights, and its products are computed in sampling. Another scale is
        set without copying weights or compiling.

        Args:
          path: a safetensors file, or a folder of PEFT or diffusers. Module names are our own, as training writes them;
            of Wan also those of diffusers (PEFT), ComfyUI, kohya and LightX2V, with full differences.
          scale: strength of the adapter.
          expert: expert of two that is adapted: `backbone`, for noisy times, or `low_noise`.
          name: name of the adapter in `set_lora_scales` and `unload_lora`; by default that of the file, with a number
            if another adapter has it. An adapter that is merged has none.
          merge: adds the adapter to the weights instead, in their memory. Sampling then takes no more time than
            without it. The host keeps the weights that change for `unload_lora`. This pipeline, and others that share
            its weights on devices, cannot be used any more.

        Raises:
          MissingError: no file at `path`.
          UserError: a file that is not a LoRA of this model, a second expert that the model does not have, a name that
            an adapter has, or one for an adapter that is merged.
        """
        weights = self._weights
        weights.check_usable()
        if name is not None and merge:
            fix = "Leave it out; unload_lora() takes away all that is merged"
            raise UserError(f"name={name!r} is invalid: an adapter that is merged has no name. {fix}")
        if name is not None and name in weights.adapters:
            raise UserError(f"name={name!r} is invalid: an adapter of this name is attached. Use another name")
        modules = _list_modules(self.config, weights.params, self._get_lora_modules, expert)
        lora = load_lora(path, weights.params, modules)
        if merge:
            return self._with_weights(weights.merge(lora, float(scale)))
        factors, others = _split_factors(lora, weights.params)
        placed = self._devices.put(factors, offload=self._offload, mesh=self._devices.mesh)
        lora = unflatten(flatten(placed) | others)
        return self._with_weights(weights.attach(name or Path(path).stem, Adapter(lora, float(scale))))

    def set_lora_scales(self: LoraLoaderT, scales: Mapping[str, float | int]) -> LoraLoaderT:
        """Return the same pipeline with other scales of attached adapters, by their names; weights are shared.

        An adapter of scale 0 is not computed.

        Raises:
          UserError: a name of no attached adapter.
        """
        self._weights.check_usable()
        return self._with_weights(self._weights.set_scales(scales))

    def unload_lora(self: LoraLoaderT, name: str | None = None) -> LoraLoaderT:
        """Return the same pipeline without an attached adapter, or without all adapters, attached and merged.

        The weights are those before, bit by bit. Where adapters were merged, the host's copy takes the place of the
        weights in the devices' memory, and this pipeline cannot be used any more.

        Raises:
          UserError: a name of no attached adapter; one that is merged has no name.
        """
        self._weights.check_usable()
        return self._with_weights(self._weights.restore() if name is None else self._weights.detach(name))

    @property
    def lora_scales(self) -> dict[str, float]:
        """Return the scales of attached adapters, by their names."""
        return {name: adapter.scale for name, adapter in self._weights.adapters.items()}

    @property
    def denoiser_params(self) -> dict[str, Any]:
        """Return `{"backbone": ..., "text": ...}`, and `"low_noise"` of models with two experts.

        Attached adapters are in them, in copies of the weights that they change.
        """
        self._weights.check_usable()
        return self._weights.make_merged_params()

    def _with_weights(self: LoraLoaderT, weights: AdaptedWeights) -> LoraLoaderT:
        adapted = copy.copy(self)  # shares the open text encoder
        adapted._weights = weights
        adapted._denoiser = self._denoiser._replace(params=weights.make_sampling_params())
        return adapted


def _split_factors(lora: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the factors of an adapter, in the dtype of their kernels, and its other leaves by path.

    Factors are multiplied in that dtype. Scales and differences stay on the host: they are small, and only needed when
    a scale is set.
    """
    kernels, leaves = flatten(params), flatten(lora)
    factors = {
        path: leaf.astype(kernels[path[:-2]].dtype) for path, leaf in leaves.items() if path.endswith(("/a", "/b"))
    }
    return unflatten(factors), {path: leaf for path, leaf in leaves.items() if path not in factors}
