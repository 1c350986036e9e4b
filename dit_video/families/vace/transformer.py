"""VACE's transformers: diffusers' `WanVACETransformer3DModel` and the authors' `VaceWanModel`.

Both are Wan's transformers with further tensors: `vace_patch_embedding`, and the blocks of the control stack
(`vace_blocks`) with a map after each and one before the first.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.families.denoiser_format import FileLayout
from dit_video.families.wan.transformer import WanDenoiserFormat, make_wan_tensor_map, map_wan_blocks
from dit_video.models.backbones.vace import VaceControl, VaceDitConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.weights import folders
from dit_video.weights.folders import DENSE
from dit_video.weights.tensor_map import TensorMap

CLASSES: dict[FileLayout, str] = {"diffusers": "WanVACETransformer3DModel", "authors": "VaceWanModel"}
_TYPES = ("vace", "t2v")
"""Values of `model_type` in the authors' configs."""
_DEFAULT_LAYERS = [0, 5, 10, 15, 20, 25, 30, 35]
_CHANNELS: dict[FileLayout, str] = {"diffusers": "vace_in_channels", "authors": "vace_in_dim"}
"""Setting of the number of control channels."""


class VaceDenoiserFormat(WanDenoiserFormat):
    """Files of diffusers' `WanVACETransformer3DModel` and of the authors' `VaceWanModel`."""

    config_class = VaceDitConfig
    layouts = {name: layout for layout, name in CLASSES.items()}  # noqa: RUF012 (declared by the base class)
    unadapted = (*WanDenoiserFormat.unadapted, "backbone/control/embed/kernel")

    def read_config(self, folder: Path, document: dict[str, Any]) -> VaceDitConfig:
        layout = self.layouts[document["_class_name"]]
        settings, own = dict(document), ("vace_layers", _CHANNELS[layout])
        layers, channels = (settings.pop(name, None) for name in own)
        if layout == "authors":
            if (kind := settings.get("model_type", "vace")) not in _TYPES:
                rule = f"a model of VACE has the type {' or '.join(_TYPES)}"
                raise UserError(f"{folder / 'config.json'}: model_type={kind} is invalid: {rule}. Use another folder.")
            settings["model_type"] = "t2v"
        folders.check_supported(folder, {"image_dim": None, **settings}, {"image_dim": None})
        base = super().read_config(folder, settings)
        if layers is None:
            layers = _DEFAULT_LAYERS if layout == "diffusers" else list(range(0, base.layers, 2))
        if channels is None:
            channels = 96 if layout == "diffusers" else base.channels
        control = VaceControl(
            latent_channels=base.channels,
            mask_channels=_count_mask_channels(folder, _CHANNELS[layout], channels, base),
            layers=_count_control_layers(folder, layers, base),
        )
        fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        return VaceDitConfig(**fields, conditioning=(control,))

    def make_document(self, config: WanDitConfig, layout: FileLayout) -> dict[str, Any]:
        assert isinstance(config, VaceDitConfig)
        own = {"_class_name": CLASSES[layout], "vace_layers": list(config.hint_layers)}
        if layout == "authors":
            own["model_type"] = "vace"
        return super().make_document(config, layout) | own | {_CHANNELS[layout]: config.control.channels}

    def make_tensor_map(self, config: WanDitConfig, layout: FileLayout) -> TensorMap:
        assert isinstance(config, VaceDitConfig)
        layers = config.control.layers
        before, after = ("proj_in", "proj_out") if layout == "diffusers" else ("before_proj", "after_proj")
        base = make_wan_tensor_map(config, layout)
        return {
            **base,
            "control/embed/kernel": base["embed/kernel"]._replace(name="vace_patch_embedding.weight"),
            "control/embed/bias": base["embed/bias"]._replace(name="vace_patch_embedding.bias"),
            **folders.map_kernel_and_bias("control/input", f"vace_blocks.0.{before}", DENSE),
            **map_wan_blocks(config, layout, ours="control/blocks", theirs="vace_blocks", layers=layers),
            **folders.map_kernel_and_bias("control/blocks/hint", f"vace_blocks.{{}}.{after}", DENSE, layers=layers),
        }


def _count_mask_channels(folder: Path, name: str, channels: int, config: WanDitConfig) -> int:
    """Return the number of mask channels among the control's.

    Raises:
      UserError: If the latents of two clips leave no channels for the mask.
    """
    if channels <= 2 * config.channels:
        rule = f"two latents of {config.channels} channels and a mask need at least {2 * config.channels + 1}"
        fix = "Copy or download the file again"
        raise UserError(f"{folder / 'config.json'}: {name}={channels} is invalid: {rule}. {fix}.")
    return channels - 2 * config.channels


def _count_control_layers(folder: Path, layers: Sequence[int], config: WanDitConfig) -> int:
    """Return the number of control layers.

    Raises:
      UserError: If the layers' hints are not added after every second, third … block, beginning with the first.
    """
    count = len(layers)
    if not count or config.layers % count or list(layers) != list(range(0, config.layers, config.layers // count)):
        rule = f"control is added after every n-th of the {config.layers} layers, from the first on"
        fix = f"Use evenly spaced layers, such as {list(range(0, config.layers, 2))}"
        raise UserError(f"{folder / 'config.json'}: vace_layers={list(layers)} is invalid: {rule}. {fix}.")
    return count
