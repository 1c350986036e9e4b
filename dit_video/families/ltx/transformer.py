"""LTX-Video's transformers: diffusers' `LTXVideoTransformer3DModel`.

The channels of self-attention's queries and keys are ordered differently here: the two channels that a rotary embedding
rotates are adjacent there, and half a head apart here.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.families.denoiser_format import DenoiserFormat, FileLayout
from dit_video.families.family import read_pipeline_class
from dit_video.families.ltx.autoencoder import RESIDUAL_DOWN_BLOCK
from dit_video.models.backbones.ltx import LtxDitConfig
from dit_video.weights import folders
from dit_video.weights.lora import LoraModule
from dit_video.weights.streaming import FileMap
from dit_video.weights.tensor_map import TensorMap, TensorMapping

CLASS, CONDITION_CLASS = "LTXVideoTransformer3DModel", "LTXConditionPipeline"
LAYOUTS: dict[str, FileLayout] = {CLASS: "diffusers"}
_HEADS_FIRST = "(heads j two) -> (heads two j)"
_DEFAULTS: dict[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
    "attention_bias": True,
    "attention_out_bias": True,
}
_VARIABLE = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim")
_SUPPORTED = {
    name: value for name, value in _DEFAULTS.items() if name not in (*_VARIABLE, "num_layers", "caption_channels")
}
"""Settings with a single supported value, which all published versions have."""

_CAUSAL_POSITIONS = "_causal_temporal_positioning"
"""Our own setting, named as in the authors' configs: positions count the seconds before a token's first frame.
diffusers has no such setting, and ignores those that begin with an underscore."""

# Names: ours, diffusers', and the authors' in LoRA files where they differ.
_TOP_LEVEL_LINEAR = (
    ("embed", "proj_in", "patchify_proj"),
    ("text_in", "caption_projection.linear_1", ""),
    ("text_out", "caption_projection.linear_2", ""),
    ("time_in", "time_embed.emb.timestep_embedder.linear_1", "adaln_single.emb.timestep_embedder.linear_1"),
    ("time_out", "time_embed.emb.timestep_embedder.linear_2", "adaln_single.emb.timestep_embedder.linear_2"),
    ("modulation", "time_embed.linear", "adaln_single.linear"),
    ("head", "proj_out", ""),
)
_LINEAR = (
    ("value", "attn1.to_v"),
    ("out", "attn1.to_out.0"),
    ("cross_query", "attn2.to_q"),
    ("cross_key", "attn2.to_k"),
    ("cross_value", "attn2.to_v"),
    ("cross_out", "attn2.to_out.0"),
    ("up", "ff.net.0.proj"),
    ("down", "ff.net.2"),
)
_ROTARY_LINEAR = (("query", "attn1.to_q"), ("key", "attn1.to_k"))


LTX_INSTRUCTIONS = """\
Rewrite the user's text as a prompt for a video model, as a camera operator would describe one shot. Keep what the \
text means. Write a single paragraph of at most 150 words, literal and exact, in the order in which things happen. \
The first sentence is the main action, without an introduction. Then give, in this order: movements and gestures; \
what people and objects look like; the background; the camera's angle and motion; light and colours; and what \
changes or happens suddenly. Answer with the prompt alone."""
"""After the rules of the authors' prompt enhancement (LTX-Video, `T2V_CINEMATIC_PROMPT`), in our words."""


class LtxDenoiserFormat(DenoiserFormat[LtxDitConfig]):
    """Files of diffusers' `LTXVideoTransformer3DModel`.

    Positions count the seconds before a token's first frame if the config says so (configs written here do), or if the
    pipeline does.
    """

    config_class = LtxDitConfig
    layouts = LAYOUTS
    prompt_instructions = LTX_INSTRUCTIONS

    def read_config(self, folder: Path, document: dict[str, Any]) -> LtxDitConfig:
        settings = folders.get_settings(folder, document, _DEFAULTS)
        width = settings["num_attention_heads"] * settings["attention_head_dim"]
        channels = settings["in_channels"]
        fixed = {"cross_attention_dim": width, "out_channels": channels} | _SUPPORTED
        folders.check_supported(folder, settings | {"out_channels": settings["out_channels"] or channels}, fixed)
        is_causal = document.get(_CAUSAL_POSITIONS)
        is_causal = is_095_pipeline(folder.parent) if is_causal is None else is_causal
        return LtxDitConfig(
            channels=channels,
            context_width=settings["caption_channels"],
            width=width,
            layers=settings["num_layers"],
            heads=settings["num_attention_heads"],
            time_coordinate="frame seconds" if is_causal else "seconds",
        )

    def make_document(self, config: LtxDitConfig, layout: FileLayout) -> dict[str, Any]:
        if layout != "diffusers":
            raise UserError(f"layout={layout} is invalid: the authors' files hold several models. Use diffusers.")
        base = LtxDitConfig()
        values = {name: (getattr(base, name),) for name in ("patch", "extents", "time")}
        for name, supported in (values | {"time_coordinate": ("seconds", "frame seconds")}).items():
            if (value := getattr(config, name)) not in supported:
                fix = f"{' or '.join(map(str, supported))}, or the native layout"
                raise UserError(f"{name}={value} is invalid: {CLASS} can't express it. Use {fix}.")
        return {
            "_class_name": CLASS,
            **_DEFAULTS,
            "in_channels": config.channels,
            "out_channels": config.channels,
            "num_attention_heads": config.heads,
            "attention_head_dim": config.width // config.heads,
            "cross_attention_dim": config.width,
            "num_layers": config.layers,
            "caption_channels": config.context_width,
            _CAUSAL_POSITIONS: config.time_coordinate == "frame seconds",
        }

    def make_file_map(self, config: LtxDitConfig, layout: FileLayout) -> FileMap:
        return FileMap.from_tensor_map(make_ltx_tensor_map(config))

    def get_lora_modules(
        self, config: LtxDitConfig, *, primary_layout: FileLayout = "diffusers"
    ) -> dict[str, LoraModule]:
        """Return the linear maps that a LoRA may adapt, by diffusers' names and, where they differ, the authors'."""
        mapping = TensorMapping("", _HEADS_FIRST, (("heads", config.heads), ("two", 2)))
        order = tuple(map(int, mapping.to_ours(np.arange(config.width))))
        reordered = {f"blocks/{ours}/kernel" for ours, _ in _ROTARY_LINEAR}
        modules: dict[str, LoraModule] = {}
        for path, foreign in make_ltx_tensor_map(config).items():
            if path.endswith("/kernel"):
                path_order = order if path in reordered else None
                for layer, name in enumerate(foreign.names):
                    stack_layer = None if foreign.layers is None else layer
                    modules[name.removesuffix(".weight")] = LoraModule(path, stack_layer, order=path_order)
        others = {authors: modules[theirs] for _, theirs, authors in _TOP_LEVEL_LINEAR if authors}
        return modules | others if primary_layout == "diffusers" else others | modules


def is_095_pipeline(folder: Path) -> bool:
    """Return True for the folder of a pipeline of version 0.9.5 or later.

    Its class is `LTXConditionPipeline`, or its autoencoder downsamples with residuals. For these versions, the authors'
    transformer configs have `causal_temporal_positioning`, which diffusers' lack.
    """
    vae = folder / "vae" / "config.json"
    kinds = read_json(vae).get("down_block_types") if vae.is_file() else None
    return read_pipeline_class(folder) == CONDITION_CLASS or RESIDUAL_DOWN_BLOCK in (kinds or ())


def make_ltx_tensor_map(config: LtxDitConfig) -> TensorMap:
    """Return the tensor map of diffusers' class."""
    names = folders.map_linear({ours: theirs for ours, theirs, _ in _TOP_LEVEL_LINEAR})
    names["head_table"] = TensorMapping("scale_shift_table")
    axis_sizes = (("heads", config.heads), ("two", 2))

    def add(ours: str, theirs: str, pattern: str = "", sizes: tuple[tuple[str, int], ...] = ()) -> None:
        names[f"blocks/{ours}"] = TensorMapping(f"transformer_blocks.{{}}.{theirs}", pattern, sizes, config.layers)

    linear = {f"blocks/{ours}": f"transformer_blocks.{{}}.{theirs}" for ours, theirs in _LINEAR}
    names |= folders.map_linear(linear, layers=config.layers)
    for ours, theirs in _ROTARY_LINEAR:
        add(f"{ours}/kernel", f"{theirs}.weight", "(heads j two) i -> i (heads two j)", axis_sizes)
        add(f"{ours}/bias", f"{theirs}.bias", _HEADS_FIRST, axis_sizes)
    for ours, theirs in (("query_norm", "attn1.norm_q"), ("key_norm", "attn1.norm_k")):
        add(f"{ours}/scale", f"{theirs}.weight", _HEADS_FIRST, axis_sizes)
    for ours, theirs in (("cross_query_norm", "attn2.norm_q"), ("cross_key_norm", "attn2.norm_k")):
        add(f"{ours}/scale", f"{theirs}.weight")
    add("table", "scale_shift_table")
    return names
