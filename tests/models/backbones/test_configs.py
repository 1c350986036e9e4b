"""Configs of denoisers: defaults, refused values, and names of earlier versions."""

import functools
import json
from pathlib import Path

import pytest
import safetensors

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.trees import count_values, flatten
from dit_video.models.backbones.dit import DIT_SIZES, DiTConfig
from dit_video.models.backbones.ltx import LtxDitConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.positions import BoundaryEmbedding, FactorizedEmbedding, SineCosine
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig, TemporalLayers
from dit_video.models.backbones.transformer import CrossAttention
from dit_video.models.backbones.unet import UnetConfig
from dit_video.models.backbones.vace import VaceDitConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import get_param_shapes
from dit_video.nn.attention import CausalFrames, RelativeBias, SlidingWindow, SpaceOnly, SparseCausal, TimeOnly
from dit_video.tokens import Grid, Rotary3d

CONFIG = DiTConfig(channels=2, context_width=6, width=24, layers=2, heads=2, mlp_ratio=2.0)
SHAPES = Path(__file__).resolve().parents[3] / "experiments" / "pretrained" / "shapes"


SIZES = {"channels": 2, "context_width": 6, "width": 24, "heads": 2}
DIT_BILLIONS = {"S": 0.033, "B": 0.13, "L": 0.42, "XL": 0.62, "1B": 1.1, "5B": 5.0, "14B": 14.0}
"""Parameters of the named sizes."""


def make_config(**fields) -> DiTConfig:
    return DiTConfig(**SIZES | fields)


def make_size(name: str, **fields) -> DiTConfig:
    return DiTConfig(**DIT_SIZES[name] | fields)


def test_defaults_follow_from_other_fields():
    assert CONFIG.token_width == 8
    assert CONFIG.rotary_embedding == Rotary3d(split=(4, 4, 4))
    assert CONFIG.replace(width=48).rotary_embedding == Rotary3d(split=(8, 8, 8))
    assert CONFIG.absolute_position == BoundaryEmbedding()
    assert make_config(cond_channels=3).cond_width == 12


def test_the_cost_of_a_layer_follows_from_its_pattern():
    grid = Grid(5, 2, 3)
    whole, space, time = 30.0**2, 5 * 6.0**2, 6 * 5.0**2
    assert make_config(layers=3).attention_pairs(grid) == whole
    assert make_config(layers=4, pattern=(SpaceOnly(), TimeOnly())).attention_pairs(grid) == (space + time) / 2
    latte = SpatioTemporalDiTConfig(**SIZES | {"layers": 4}, temporal=TemporalLayers(spatial_layers=2))
    assert latte.attention_pairs(grid) == space + time / 2
    spatial = make_config(layers=4, pattern=SpaceOnly())
    assert latte.layer_params == spatial.layer_params + (4 + 2 * latte.mlp_ratio) / 2
    wan = WanDitConfig(channels=4, context_width=6, width=16, mlp_dim=24, layers=2, heads=2, time_width=8)
    assert wan.attention_pairs(grid) == whole


def test_the_shipped_model_is_one_of_the_default_options():
    written = json.loads((SHAPES / "pipeline.json").read_text())["config"]["model"]["backbone"]
    config = config_json.from_json(written)
    assert config == DiTConfig(channels=8, context_width=64, width=176, layers=4, heads=4)
    with safetensors.safe_open(SHAPES / "denoiser.safetensors", framework="np") as file:
        held = {
            name.removeprefix("backbone/"): tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118  (the file isn't a dictionary)
            if name.startswith("backbone/")
        }
    assert held == {path: leaf.shape for path, leaf in flatten(get_param_shapes(config.make)).items()}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        make_config(rotary="none", absolute_position=None, context=CrossAttention(pooled=False)),
        make_config(absolute_position=FactorizedEmbedding(sizes=(4, 5, 6)), registers=2),
        make_config(context_width=0, classes=7, absolute_position=SineCosine()),
        make_config(rotary=Rotary3d(split=(4, 4, 4), scale=(0.5, 1.0, 1.0), stretch=(1.0, 2.0, 2.0)), time="token"),
        make_config(pattern=(SpaceOnly(), TimeOnly()), relative_bias=RelativeBias(), registers=1),
        MMDiTConfig(**SIZES, pattern=CausalFrames()),
        SpatioTemporalDiTConfig(**SIZES, temporal=TemporalLayers(spatial_layers=3, layers=2)),
        WanDitConfig.ti2v_5b(pattern=SlidingWindow(radius=(1, None, None))),
    ],
)
def test_configs_are_the_same_after_json(config):
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(config)))) == config


@pytest.mark.parametrize(
    ("make", "billions"),
    [
        *((functools.partial(make_size, name), billions) for name, billions in DIT_BILLIONS.items()),
        (WanDitConfig.t2v_1_3b, 1.42),
        (WanDitConfig.t2v_14b, 14.3),
        (WanDitConfig.i2v_14b, 16.4),
        (WanDitConfig.ti2v_5b, 5.0),
    ],
)
def test_named_configs_have_the_stated_numbers_of_parameters(make, billions):
    config = make(channels=16, context_width=4096)
    assert count_values(get_param_shapes(config.make)) == pytest.approx(billions * 1e9, rel=0.05)
    assert make(channels=16, context_width=4096, layers=1).layers == 1


def test_the_cost_of_a_layer():
    assert make_config(mlp_ratio=4.0).layer_params == 14
    assert make_config(mlp_ratio=4.0, mlp="swiglu").layer_params == 18
    assert MMDiTConfig(**SIZES).layer_params == 12
    assert WanDitConfig(width=128, heads=1, mlp_dim=512).layer_params == 14


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_config(width=25), "width 25 must be divisible by its 2 heads"),
        (lambda: make_config(rotary=Rotary3d(split=(4, 4, 6))), r"rotary split \(4, 4, 6\) .* head width 12"),
        (lambda: make_config(width=10), "head width 5"),
        (lambda: Rotary3d(split=(4, 4, 4), scale=(1.0, 0.0, 1.0)), "must be positive"),
        (lambda: Rotary3d(split=(4, 4, 4), stretch=(1.0, -2.0, 1.0)), "must be positive"),
        (lambda: make_config(width=3, heads=3, rotary="none", absolute_position=SineCosine()), "even width, not 3"),
        (lambda: FactorizedEmbedding(sizes=(1, 4, 4)), r"\(1, 4, 4\) .* use at least 2"),
        (lambda: make_config(registers=-1), "registers=-1 is invalid: it must be at least 0"),
        (lambda: make_config(cond_channels=-1), "cond_channels=-1 is invalid: it must be at least 0"),
        (lambda: make_config(context_width=-1), "context_width=-1 is invalid: it must be at least 0"),
        (lambda: make_config(classes=-1), "classes=-1 is invalid: it must be at least 0"),
        (lambda: MMDiTConfig(**SIZES | {"context_width": 0}), "context_width=0 is invalid: it must be at least 1"),
        (lambda: make_config(layers=3, pattern=(SpaceOnly(), TimeOnly())), "3 layers .* 2 patterns .* a divisor"),
        (lambda: make_config(pattern=()), "0 patterns in turn; give 1"),
        (lambda: make_config(attention="splash", pattern=SparseCausal()), "splash attention cannot do SparseCausal"),
        (
            lambda: make_config(attention="tokamax", pattern=SpaceOnly(), registers=1),
            "tokamax attention cannot do With",
        ),
        (lambda: make_config(attention="cudnn", relative_bias=RelativeBias()), "cudnn attention cannot add a bias"),
        (
            lambda: SpatioTemporalDiTConfig(**SIZES, temporal=TemporalLayers(spatial_layers=4)),
            "6 layers .* spatial_layers, not 4",
        ),
        (lambda: TemporalLayers(layers=0), "layers=0 is invalid: it must be at least 1"),
        (lambda: WanDitConfig(layers=4, pattern=(SpaceOnly(), TimeOnly(), SpaceOnly())), "4 layers .* 3 patterns"),
        (lambda: WanDitConfig(attention="splash", pattern=SparseCausal()), "splash attention cannot do SparseCausal"),
        (lambda: WanDitConfig(width=36, heads=5), "width 36 .* 5 heads in even parts"),
        (lambda: WanDitConfig(width=36, heads=12), "12 heads in even parts"),
        (lambda: WanDitConfig(text_length=0), "text_length=0 .* at least 1"),
        (lambda: WanDitConfig(image_positions=514), "image_positions=514 .* set image_width"),
    ],
)
def test_invalid_configs_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (config, size)
        for config in (DiTConfig, MMDiTConfig, SpatioTemporalDiTConfig, WanDitConfig, VaceDitConfig, LtxDitConfig)
        for size in ("channels", "width", "layers", "heads", "patch")
    ]
    + [(UnetConfig, "channels"), (UnetConfig, "width")],
)
@pytest.mark.parametrize("value", [0, -6])
def test_sizes_below_one_are_refused(config, size, value):
    fields = {"channels": 4, "context_width": 6, size: Grid(value, 2, 2) if size == "patch" else value}
    with pytest.raises(UserError, match=rf"^{size}={value} is invalid: it must be at least 1\. Use {size}=1 or more"):
        config(**fields)
