"""Which parameters of the models that ship each pattern on parameter paths selects.

A pattern that stops matching changes no equality of results: it would leave a weight whole on every device, in another
dtype, or without an adapter.
"""

import re
from collections import defaultdict

import pytest

from dit_video.core.errors import UserError
from dit_video.core.offload import is_stacked_kernel
from dit_video.core.trees import flatten
from dit_video.distributed.sharding import DEFAULT_RULES, TENSOR_RULES
from dit_video.experiment.self_check.model_checks import POSITION_PATHS
from dit_video.families.denoisers import find_format, list_formats
from dit_video.models.autoencoders import (
    CausalVaeConfig,
    ImageVaeConfig,
    InflatedConfig,
    LtxVaeConfig,
    PatchVaeConfig,
    VqConfig,
)
from dit_video.models.backbones.controlled_dit import ControlledDiTConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.ltx import LtxDitConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig
from dit_video.models.backbones.unet import UnetConfig
from dit_video.models.backbones.vace import VaceControl, VaceDitConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.encoders import ByteEncoderConfig, T5Config, WordEncoderConfig
from dit_video.nn import LoraConfig, get_param_shapes
from dit_video.training.losses.denoiser import TEMPORAL_PATHS
from dit_video.training.optim.optimizer import Muon

LAYERS = 7
"""Number of layers, which no other axis has."""
SIZES = {"channels": 4, "width": 24, "layers": LAYERS, "heads": 2}
DENOISERS = {
    "DiT": DiTConfig(**SIZES, context_width=8, mlp="swiglu"),
    "DiT of classes": DiTConfig(**SIZES, context_width=0, classes=3, modulation="own"),
    "MMDiT": MMDiTConfig(**SIZES, context_width=8),
    "SpatioTemporalDiT": SpatioTemporalDiTConfig(**SIZES, context_width=8),
    "ControlledDiT": ControlledDiTConfig(**SIZES, context_width=8, control_layers=LAYERS),
    "Wan": WanDitConfig(**SIZES, image_width=8),
    "VACE": VaceDitConfig(**SIZES, conditioning=(VaceControl(layers=LAYERS),)),
    "LTX-Video": LtxDitConfig(**SIZES),
    "U-Net": UnetConfig(channels=4, context_width=8, width=8, heads=2, groups=4),
}
ENCODERS = {
    "ByteEncoder": ByteEncoderConfig(width=24, layers=LAYERS, heads=2),
    "WordEncoder": WordEncoderConfig(width=24, layers=LAYERS, heads=2, buckets=8),
    "T5": T5Config(vocabulary=8, width=24, layers=LAYERS, heads=2, mlp_width=32),
}
AUTOENCODERS = {
    "PatchVae": PatchVaeConfig(),
    "CausalVae": CausalVaeConfig(),
    "CausalVae of Wan 2.2": CausalVaeConfig.wan22(),
    "VQ": VqConfig(),
    "MoVQ": VqConfig.kandinsky(),
    "ImageVae": ImageVaeConfig(),
    "InflatedVae": InflatedConfig(image=ImageVaeConfig()),
    "LtxVae": LtxVaeConfig.ltx_095(),
}
MODELS = DENOISERS | ENCODERS | AUTOENCODERS
SHAPES = {name: flatten(get_param_shapes(config.make)) for name, config in MODELS.items()}
OPTIMIZER = Muon()
PATTERNS = {
    "tensor: fused maps into heads": TENSOR_RULES[0][0],
    "tensor: maps into heads and hidden widths": TENSOR_RULES[1][0],
    "tensor: maps out of them": TENSOR_RULES[2][0],
    "adapters": LoraConfig().targets[0],
    "temporal weights": TEMPORAL_PATHS,
    "embeddings of positions": POSITION_PATHS,
}
LEVELS = "; ".join(f"{coder}/levels/N/blocks/N: conv_in conv_out shortcut" for coder in ("decoder", "encoder"))
"""Layers of an autoencoder's levels, which are lists and no stacks."""
EXPECTED = {
    "tensor: fused maps into heads": {
        "DiT": "blocks: cross_key_value qkv",
        "DiT of classes": "blocks: qkv",
        "MMDiT": "blocks/context: qkv; blocks/video: qkv",
        "SpatioTemporalDiT": "blocks: cross_key_value qkv; temporal_blocks: qkv",
        "ControlledDiT": "blocks: cross_key_value qkv; control/blocks: cross_key_value qkv",
        "ByteEncoder": "blocks: qkv",
        "WordEncoder": "blocks: qkv",
    },
    "tensor: maps into heads and hidden widths": {
        "DiT": "blocks: cross_query gate up",
        "DiT of classes": "blocks: up",
        "MMDiT": "blocks/context: up; blocks/video: up",
        "SpatioTemporalDiT": "blocks: cross_query up; temporal_blocks: up",
        "ControlledDiT": "blocks: cross_query up; control/blocks: cross_query up",
        "Wan": "blocks: cross_key cross_query cross_value image_key image_value key query up value",
        "VACE": (
            "blocks: cross_key cross_query cross_value key query up value; control/blocks: cross_key cross_query "
            "cross_value key query up value"
        ),
        "LTX-Video": "blocks: cross_key cross_query cross_value key query up value",
        "ByteEncoder": "blocks: up",
        "WordEncoder": "blocks: up",
        "T5": "blocks: gate key query up value",
    },
    "tensor: maps out of them": {
        "DiT": "blocks: cross_out down out",
        "DiT of classes": "blocks: down out",
        "MMDiT": "blocks/context: down out; blocks/video: down out",
        "SpatioTemporalDiT": "blocks: cross_out down out; temporal_blocks: down out",
        "ControlledDiT": "blocks: cross_out down out; control/blocks: cross_out down out",
        "Wan": "blocks: cross_out down out",
        "VACE": "blocks: cross_out down out; control/blocks: cross_out down out",
        "LTX-Video": "blocks: cross_out down out",
        "ByteEncoder": "blocks: down out",
        "WordEncoder": "blocks: down out",
        "T5": "blocks: down out",
    },
    "adapters": {
        "DiT": "blocks: cross_key_value cross_out cross_query down gate out qkv up",
        "DiT of classes": "blocks: down out own qkv up",
        "MMDiT": "blocks/context: down out own qkv up; blocks/video: down out own qkv up",
        "SpatioTemporalDiT": (
            "blocks: cross_key_value cross_out cross_query down out qkv up; temporal_blocks: down out qkv up"
        ),
        "ControlledDiT": (
            "blocks: cross_key_value cross_out cross_query down out qkv up; control/blocks: cross_key_value cross_out "
            "cross_query down hint out qkv up"
        ),
        "Wan": "blocks: cross_key cross_out cross_query cross_value down image_key image_value key out query up value",
        "VACE": (
            "blocks: cross_key cross_out cross_query cross_value down key out query up value; control/blocks: "
            "cross_key cross_out cross_query cross_value down hint key out query up value"
        ),
        "LTX-Video": "blocks: cross_key cross_out cross_query cross_value down key out query up value",
        "ByteEncoder": "blocks: down out qkv up",
        "WordEncoder": "blocks: down out qkv up",
        "T5": "blocks: down gate key out query up value",
        **dict.fromkeys(["CausalVae", "CausalVae of Wan 2.2", "VQ", "ImageVae", "InflatedVae"], LEVELS),
        "MoVQ": (
            "decoder/levels/N/blocks/N: conv_in conv_out shortcut; decoder/levels/N/blocks/N/norm_in: scale shift; "
            "decoder/levels/N/blocks/N/norm_out: scale shift; encoder/levels/N/blocks/N: conv_in conv_out shortcut"
        ),
        "LtxVae": (
            "decoder/levels/N/inner/blocks/N: conv_in conv_out; decoder/middle/blocks/N: conv_in conv_out; "
            "encoder/levels/N/blocks/N: conv_in conv_out"
        ),
    },
    "temporal weights": {
        "SpatioTemporalDiT": (
            "model: temporal_blocks temporal_position; temporal_blocks: down key_norm out qkv query_norm up"
        ),
        "InflatedVae": "decoder/levels/N/temporal/N: conv_in conv_out norm_in norm_out",
    },
    "embeddings of positions": {
        "DiT": "model: position",
        "DiT of classes": "model: position",
        "MMDiT": "model: position",
        "SpatioTemporalDiT": "model: position temporal_position",
        "ControlledDiT": "model: position",
        "T5": "blocks: position",
    },
}
"""Parts of each model whose parameters a pattern selects, after the module that they are in; a model is left out if it
selects none."""


def describe(paths) -> str:
    """Return the modules of parameters, such as `blocks: qkv up; levels/N/blocks/N: conv_in`; N is any number."""
    modules = defaultdict(set)
    for path in paths:
        *parents, module, _ = ["", *re.sub(r"(?<=/)\d+(?=/)", "N", path).split("/")]
        modules["/".join(parents[1:]) or "model"].add(module)
    return "; ".join(f"{parent}: {' '.join(sorted(names))}" for parent, names in sorted(modules.items()))


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_selects_the_parameters_of_the_table(name):
    selected = {model: [path for path in shapes if re.search(PATTERNS[name], path)] for model, shapes in SHAPES.items()}
    assert {model: describe(paths) for model, paths in selected.items() if paths} == EXPECTED[name]


def test_the_table_has_a_model_for_each_pattern_and_for_each_rule_of_sharding():
    assert EXPECTED.keys() == PATTERNS.keys()
    assert all(EXPECTED.values())
    assert {pattern for pattern, _ in DEFAULT_RULES.tensor_rules} <= set(PATTERNS.values())


@pytest.mark.parametrize("model", MODELS)
def test_stacked_parameters_are_those_with_an_axis_of_layers(model):
    for path, leaf in SHAPES[model].items():
        assert bool(re.search(DEFAULT_RULES.stacked_pattern, path)) == (leaf.shape[:1] == (LAYERS,)), path
    # Kernels of temporal blocks stay on the devices: their stack is scanned beside another one.
    offloaded = {path for path, leaf in SHAPES[model].items() if is_stacked_kernel(path, leaf)}
    stacked = {path for path, leaf in SHAPES[model].items() if leaf.shape[:1] == (LAYERS,) and path.endswith("kernel")}
    assert offloaded == {path for path in stacked if not path.startswith("temporal_")}


@pytest.mark.parametrize("model", MODELS)
def test_weights_that_decay_are_the_kernels(model):
    decayed = {path for path in SHAPES[model] if any(re.search(p, path) for p in OPTIMIZER.weight_decay_patterns)}
    assert decayed == {path for path, leaf in SHAPES[model].items() if path.endswith("/kernel")}


@pytest.mark.parametrize("model", [name for name in DENOISERS | ENCODERS if name != "U-Net"])
def test_muon_updates_the_kernels_of_blocks(model):
    kernels = [path for path in SHAPES[model] if path.endswith("/kernel")]
    chosen = {path for path in kernels if any(re.search(pattern, path) for pattern in OPTIMIZER.patterns)}
    assert chosen == {path for path in kernels if SHAPES[model][path].shape[0] == LAYERS}


@pytest.mark.parametrize("model", MODELS)
def test_muon_takes_every_model_by_default(model):
    OPTIMIZER.check_paths(SHAPES[model])
    with pytest.raises(UserError, match="patterns='blocs/' is invalid: it matches no parameter"):
        Muon(patterns=("blocs/",)).check_paths(SHAPES[model])


def test_paths_that_a_familys_format_names_are_parameters_of_its_models():
    formats = {type(find_format(config)): model for model, config in DENOISERS.items() if find_format(config)}
    assert set(formats) == {type(each) for each in list_formats()}
    for kind, model in formats.items():
        missing = {*kind.float32_kernels, *(path.removeprefix("backbone/") for path in kind.unadapted)} - {
            *SHAPES[model]
        }
        assert not missing, model
