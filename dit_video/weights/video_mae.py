"""Reader of the parameters of VideoMAE v2's ViT-g, from the weights of its authors."""

import os
from pathlib import Path
from typing import Any

from dit_video.models.features.video_mae import VideoMaeConfig
from dit_video.nn import get_param_shapes
from dit_video.weights.diffusers import DENSE, map_kernel_and_bias, map_scale_and_shift
from dit_video.weights.io import read_network_file
from dit_video.weights.safetensors import open_safetensors
from dit_video.weights.tensor_map import TensorMapping

VIDEO_MAE_FILE = "vit_g_hybrid_pt_1200e_ssv2_ft.pth"
"""Published file of https://huggingface.co/OpenGVLab/InternVideoMAE_models, in its folder `mae-g`."""
VIDEO_MAE = VideoMaeConfig()
"""Configuration of the network of that file."""
_ROOTS = ("model.", "module.")
"""Beginnings of names, in this order, where the file has the state dict in a dictionary with other values."""
_LINEAR = {"out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
_NORMS = {"norm_attention": "norm1", "norm_mlp": "norm2"}
_BIASES = {"query_bias": "attn.q_bias", "value_bias": "attn.v_bias"}


def load_video_mae(path: str | os.PathLike, config: VideoMaeConfig = VIDEO_MAE) -> dict[str, Any]:
    """Read the parameters of `VideoMae` from a file of tensors with the names of VideoMAE v2.

    `tools/convert.py FILE video_mae.safetensors --to safetensors` makes it of the published file. The layer of the
    classes is not read.

    Raises:
      MissingError: the file does not exist.
      UserError: the file is pickled or corrupt, or tensors are missing, unexpected or of another shape.
    """
    names = _list_names(Path(path))
    root = next((root for root in _ROOTS if any(name.startswith(root) for name in names)), "")
    head = {f"{root}head.weight", f"{root}head.bias"}
    return read_network_file(
        path,
        make_video_mae_tensor_map(config, root=root),
        get_param_shapes(config.make),
        network="VideoMAE",
        recipe=f"Make it of the published {VIDEO_MAE_FILE}: tools/convert.py {VIDEO_MAE_FILE} {Path(path).name} "
        "--to safetensors",
        ignored=tuple(name for name in names if name in head or not name.startswith(root)),
    )


def _list_names(path: Path) -> list[str]:
    """Return the names of a file's tensors, none if `read_network_file` will refuse it."""
    if path.suffix != ".safetensors" or not path.is_file():
        return []
    with open_safetensors(path) as file:
        return list(file.keys())


def make_video_mae_tensor_map(config: VideoMaeConfig, *, root: str = "") -> dict[str, TensorMapping]:
    """Return the names of our parameters in VideoMAE v2, after the root of a nested state dict."""
    names = map_scale_and_shift("norm", f"{root}fc_norm")
    names["embed/kernel"] = TensorMapping(
        f"{root}patch_embed.proj.weight",
        "o C r p q -> (r p q C) o",
        axis_sizes=(("r", config.patch_frames), ("p", config.patch), ("q", config.patch)),
    )
    names["embed/bias"] = TensorMapping(f"{root}patch_embed.proj.bias")
    block, layers = f"{root}blocks.{{}}", config.layers
    names["blocks/qkv/kernel"] = TensorMapping(f"{block}.attn.qkv.weight", DENSE, layers=layers)
    for ours, theirs in _BIASES.items():
        names[f"blocks/{ours}"] = TensorMapping(f"{block}.{theirs}", layers=layers)
    for ours, theirs in _LINEAR.items():
        names |= map_kernel_and_bias(f"blocks/{ours}", f"{block}.{theirs}", DENSE, layers=layers)
    for ours, theirs in _NORMS.items():
        names |= map_scale_and_shift(f"blocks/{ours}", f"{block}.{theirs}", layers=layers)
    return names
