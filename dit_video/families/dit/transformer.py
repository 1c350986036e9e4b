"""Class-conditional image transformers: DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740).

There are two layouts: diffusers' `DiTTransformer2DModel`, and the authors' state dict, which is the same for both
models. The state dict comes with a `config.json` that holds the model class's arguments, or as a single file under the
authors' name.

DiT predicts noise, at `1000 * time` rounded to whole steps of its schedule, and a variance. SiT predicts a velocity
from noise at 0 to data at 1: time and velocity are reversed here, and its variance is dropped. In diffusers' DiT the
time embedding's lowest frequency is lower by a factor of `10000 ** (1 / 127)`, and the MLP's norm has another eps.
"""

import contextlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_video.core.errors import UserError
from dit_video.families.denoiser_format import DenoiserFormat, FileLayout
from dit_video.models.backbones.dit import DIT_SIZES, DiTConfig
from dit_video.models.backbones.positions import ImageSineCosine
from dit_video.models.backbones.transformer import TimeEmbedding
from dit_video.tokens import Grid
from dit_video.weights import folders
from dit_video.weights.folders import DENSE, TensorFolder
from dit_video.weights.safetensors import check_safetensors_file
from dit_video.weights.streaming import ConstantTensor, FileMap
from dit_video.weights.tensor_map import TensorMapping

CLASS, LEGACY_CLASS, AUTHORS_CLASSES = "DiTTransformer2DModel", "Transformer2DModel", ("DiT", "SiT")
LAYOUTS: dict[str, FileLayout] = {
    CLASS: "diffusers",
    LEGACY_CLASS: "diffusers",
    **dict.fromkeys(AUTHORS_CLASSES, "authors"),
}

_PERIOD = 10_000.0
_DIFFUSERS_PERIOD = _PERIOD ** (128 / 127)
"""Period of diffusers' time embedding, whose frequencies end at the period; the authors' end one step before it."""
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
_LEGACY_SETTINGS: dict[str, Any] = {
    "num_vector_embeds": None,
    "cross_attention_dim": None,
    "only_cross_attention": False,
    "double_self_attention": False,
    "use_linear_projection": False,
    "attention_type": "default",
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}
"""Settings of `Transformer2DModel`, the class that published folders still name."""
_LEGACY_DEFAULTS = {
    "norm_type": "layer_norm",
    "attention_bias": False,
    "activation_fn": "geglu",
    "norm_elementwise_affine": True,
    "num_embeds_ada_norm": None,
}
_FIXED = ("dropout", "attention_bias", "activation_fn", "norm_type", "norm_elementwise_affine")
_SUPPORTED = {name: _DEFAULTS[name] for name in _FIXED}
_AUTHORS_DEFAULTS: dict[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
}
_FILE_PATTERN = re.compile(r"(?P<kind>DiT|SiT)-(?P<size>XL|L|B|S)-(?P<patch>\d+)(-(?P<height>\d+)(x\d+)?)?.*")

# Names: ours, the authors', diffusers'. First those within a block, then those that occur once.
_BLOCK_LINEAR = (
    ("out", "attn.proj", "attn1.to_out.0"),
    ("up", "mlp.fc1", "ff.net.0.proj"),
    ("down", "mlp.fc2", "ff.net.2"),
    ("own", "adaLN_modulation.1", "norm1.linear"),
)
_HEAD_LINEAR = (
    ("head_modulation", "final_layer.adaLN_modulation.1", "proj_out_1"),
    ("head", "final_layer.linear", "proj_out_2"),
)
_TIME_LINEAR = (
    ("time_in", "t_embedder.mlp.0", "timestep_embedder.linear_1"),
    ("time_out", "t_embedder.mlp.2", "timestep_embedder.linear_2"),
)
"""Layers of the time embedding, which diffusers repeats in every block."""


class DitDenoiserFormat(DenoiserFormat[DiTConfig]):
    """Files of diffusers' DiT, and of the authors of DiT and SiT.

    A checkpoint of the authors may be a single file, such as `SiT-XL-2-256.safetensors`. Its name tells what its
    tensors don't show: the model (DiT or SiT) and its number of heads.
    """

    config_class = DiTConfig
    layouts = LAYOUTS

    def read_config(self, folder: Path, document: dict[str, Any]) -> DiTConfig:
        """Return the config for the settings of either layout; `folder` is a model's folder or the authors' file.

        Raises:
          UserError: If a setting is not supported.
        """
        kind = document["_class_name"]
        if kind not in AUTHORS_CLASSES:
            defaults = _DEFAULTS | _LEGACY_SETTINGS | (_LEGACY_DEFAULTS if kind == LEGACY_CLASS else {})
            settings = folders.get_settings(folder, document, defaults)
            folders.check_supported(folder, settings, _SUPPORTED | _LEGACY_SETTINGS)
            heads = settings["num_attention_heads"]
            width = heads * settings["attention_head_dim"]
            size, layers, classes = settings["sample_size"], settings["num_layers"], settings["num_embeds_ada_norm"]
            channels, ratio, eps, period = settings["in_channels"], 4.0, settings["norm_eps"], _DIFFUSERS_PERIOD
            variance: Literal["none", "predicted", "dropped"] = "none"
            if settings["out_channels"] not in (None, channels):
                folders.check_supported(folder, settings, {"out_channels": 2 * channels})
                variance = "predicted"
        else:
            settings = folders.get_settings(folder, document, _AUTHORS_DEFAULTS)
            if not (dropout := settings["class_dropout_prob"]) > 0:
                raise UserError(
                    f"{folder}: class_dropout_prob={dropout} is not supported: there is no embedding of no class"
                )
            width, heads = settings["hidden_size"], settings["num_heads"]
            size, layers = settings["input_size"], settings["depth"]
            classes, channels, ratio = settings["num_classes"], settings["in_channels"], settings["mlp_ratio"]
            eps, period = 1e-6, _PERIOD
            variance = "none" if not settings["learn_sigma"] else "dropped" if kind == "SiT" else "predicted"
        patch = settings["patch_size"]
        if size % patch:
            raise UserError(f"{folder}: {size}x{size} latents are not divisible by the patch size {patch}")
        velocity = kind == "SiT"
        return DiTConfig(
            channels=channels,
            context_width=0,
            classes=classes,
            patch=Grid(1, patch, patch),
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=ratio,
            qk_norm="none",
            rotary="none",
            absolute_position=ImageSineCosine(side=size // patch),
            modulation="own",
            mlp_norm_eps=eps,
            time_embedding=TimeEmbedding(scale=1.0 if velocity else 1000.0, max_period=period, reversed=velocity),
            variance=variance,
        )

    def make_document(self, config: DiTConfig, layout: FileLayout) -> dict[str, Any]:
        """Return the settings of a config; the inverse of `parse_config`.

        Raises:
          UserError: If the layout can't express the config.
        """
        velocity = config.time_embedding.reversed
        kind = CLASS if layout == "diffusers" else "SiT" if velocity else "DiT"
        if layout == "diffusers" and velocity:
            raise UserError(f"{CLASS} predicts noise, so a SiT can't be written in its layout. Use the authors' layout")
        position, patch = config.absolute_position, config.patch
        if not isinstance(position, ImageSineCosine) or not config.classes:
            raise UserError(f"can't write a {kind} without class labels and sine-cosine image positions; add both")
        size = position.side * patch.h
        document: dict[str, Any]
        if layout == "authors":
            document = {
                "input_size": size,
                "patch_size": patch.h,
                "in_channels": config.channels,
                "hidden_size": config.width,
                "depth": config.layers,
                "num_heads": config.heads,
                "mlp_ratio": config.mlp_ratio,
                "num_classes": config.classes,
                "learn_sigma": config.variance != "none",
            }
        else:
            document = _DEFAULTS | {
                "num_attention_heads": config.heads,
                "attention_head_dim": config.width // config.heads,
                "in_channels": config.channels,
                "out_channels": config.channels * (1 if config.variance == "none" else 2),
                "num_layers": config.layers,
                "sample_size": size,
                "patch_size": patch.h,
                "num_embeds_ada_norm": config.classes,
                "norm_eps": config.mlp_norm_eps if config.time_embedding.max_period == _DIFFUSERS_PERIOD else 1e-5,
            }
        document = {"_class_name": kind, **document}
        # A config can be written if reading it back gives the same model.
        restored = _get_preserved_fields(self.read_config(Path(kind), document))
        if unsupported := [name for name, value in _get_preserved_fields(config).items() if restored[name] != value]:
            raise UserError(
                f"{kind} does not support the config's {', '.join(unsupported)}, so it can't be written as one"
            )
        return document

    def make_file_map(self, config: DiTConfig, layout: FileLayout) -> FileMap:
        """Return the file map of a layout."""
        column = 1 if layout == "authors" else 2
        authors = layout == "authors"
        block = "blocks.{}" if authors else "transformer_blocks.{}"
        parts: dict[str, tuple[TensorMapping, ...]] = {}

        def add(ours: str, *theirs: str, layers: int | None = None) -> None:
            parts[f"{ours}/kernel"] = tuple(TensorMapping(f"{name}.weight", DENSE, layers=layers) for name in theirs)
            parts[f"{ours}/bias"] = tuple(TensorMapping(f"{name}.bias", layers=layers) for name in theirs)

        for row in _BLOCK_LINEAR:
            add(f"blocks/{row[0]}", f"{block}.{row[column]}", layers=config.layers)
        attention = ("attn.qkv",) if authors else ("attn1.to_q", "attn1.to_k", "attn1.to_v")
        add("blocks/qkv", *(f"{block}.{name}" for name in attention), layers=config.layers)
        for row in _HEAD_LINEAR:
            add(row[0], row[column])
        embed = "x_embedder.proj" if authors else "pos_embed.proj"
        patch_sizes = (("h", config.patch.h), ("w", config.patch.w))
        parts["embed/kernel"] = (TensorMapping(f"{embed}.weight", "o c h w -> (h w c) o", patch_sizes),)
        parts["embed/bias"] = (TensorMapping(f"{embed}.bias"),)
        if authors:
            for row in _TIME_LINEAR:
                add(row[0], row[1])
            parts["labels"] = (TensorMapping("y_embedder.embedding_table.weight"),)
            return FileMap(parts, constants={"pos_embed": ConstantTensor(_make_position_table(config), "embed/kernel")})
        embedder = "transformer_blocks.{}.norm1.emb"
        for row in _TIME_LINEAR:
            add(row[0], f"{embedder.format(0)}.{row[2]}")
        parts["labels"] = (TensorMapping(f"{embedder.format(0)}.class_embedder.embedding_table.weight"),)
        return FileMap(parts, copies=_list_copies(parts, config.layers))

    def open_file(self, path: Path) -> tuple[TensorFolder, dict[str, Any]]:
        """Open the authors' checkpoint in a single file.

        Raises:
          MissingError: If the file does not exist.
          UserError: If the file's name has an unknown form, or the file is pickled or corrupt.
        """
        check_safetensors_file(path)
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is neither a .safetensors file nor the folder of a model. Use one of them")
        with contextlib.ExitStack() as on_error:
            tensors = on_error.enter_context(TensorFolder(path.parent, stem=path.stem))
            document = infer_document(path, tensors)
            on_error.pop_all()
        return tensors, document


def infer_document(path: Path, tensors: TensorFolder) -> dict[str, Any]:
    """Infer the settings of the authors' checkpoint from its name and its tensors' shapes.

    Raises:
      UserError: If the file's name has an unknown form.
    """
    match = _FILE_PATTERN.fullmatch(path.stem)
    if not match:
        raise UserError(
            f"{path} does not name its model. Name it as its authors do, such as DiT-XL-2-256x256.safetensors or "
            "SiT-XL-2-256.safetensors, or put it in a folder with a config.json"
        )
    size = DIT_SIZES[match["size"]]
    patch, shapes = int(match["patch"]), tensors.shapes
    head = shapes.get("final_layer.linear.bias", (0,))[0]
    channels = shapes.get("x_embedder.proj.weight", (0, 4))[1]
    tokens = shapes.get("pos_embed", (1, 256))[1]
    classes = shapes.get("y_embedder.embedding_table.weight", (1001,))[0] - 1
    return {
        "_class_name": match["kind"],
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": size["width"],
        "depth": size["layers"],
        "num_heads": size["heads"],
        "num_classes": classes,
        "learn_sigma": head == 2 * patch**2 * channels,
    }


def _get_preserved_fields(config: DiTConfig) -> dict[str, Any]:
    """Return the fields that a folder must preserve: all but how the model is computed and where the layouts differ."""
    ignored = ("attention", "dtype", "remat", "mlp_norm_eps")
    fields = {name: value for name, value in vars(config).items() if name not in ignored}
    embedding = replace(config.time_embedding, max_period=_PERIOD)
    return fields | {"variance": config.variance != "none", "time_embedding": embedding}


def _list_copies(parts: dict[str, tuple[TensorMapping, ...]], layers: int) -> dict[str, tuple[TensorMapping, ...]]:
    """Return the other blocks' copies of the tensors that the first block holds for all blocks."""
    first = "transformer_blocks.0.norm1.emb."
    return {
        path: tuple(foreign._replace(name=foreign.name.replace(".0.", f".{layer}.", 1)) for layer in range(1, layers))
        for path, (foreign, *_) in parts.items()
        if foreign.name.startswith(first)
    }


def _make_position_table(config: DiTConfig) -> np.ndarray:
    """Return the authors' table of positions: sines and cosines that depend only on the sizes, computed in float64."""
    position = config.absolute_position
    assert isinstance(position, ImageSineCosine)
    quarter = config.width // 4
    angles = np.arange(position.side)[:, None] / _PERIOD ** (np.arange(quarter) / quarter)
    encoding = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    shape = (position.side, position.side, 2 * quarter)
    table = np.concatenate([np.broadcast_to(encoding[None], shape), np.broadcast_to(encoding[:, None], shape)], axis=2)
    return table.reshape(1, -1, config.width).astype(np.float32)
