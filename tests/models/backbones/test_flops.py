"""FLOPs counted from configs, compared with XLA's count of the program, which is lowered but not compiled."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.backbones.controlled_dit import ControlledDiTConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.flops import count_attention_flops, count_forward_flops, count_training_flops
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.protocol import count_tokens
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig
from dit_video.models.backbones.vace import VaceControl, VaceDitConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.nn.attention import SpaceOnly
from dit_video.tokens import Grid, PackedRows
from support.marks import mark_slow_except

WIDE = {"width": 1024, "layers": 2, "heads": 8, "attention": "dense"}
MODELS = {
    "cross": (DiTConfig(channels=16, context_width=256, **WIDE), 192, 64),
    "own": (DiTConfig(channels=16, context_width=256, modulation="own", **WIDE), 192, 64),
    "joint, swiglu": (MMDiTConfig(channels=16, context_width=256, mlp="swiglu", **WIDE), 192, 64),
    "spatio-temporal": (SpatioTemporalDiTConfig(channels=16, context_width=256, **WIDE), Grid(1, 8, 8), 64),
    "registers": (DiTConfig(channels=16, context_width=256, registers=64, **WIDE), 128, 64),
    "wan": (WanDitConfig(context_width=256, mlp_dim=4096, text_length=64, **WIDE), 192, 64),
    "controlled": (ControlledDiTConfig(context_width=256, channels=16, control_layers=1, **WIDE), 192, 64),
    "vace": (
        VaceDitConfig(context_width=256, mlp_dim=4096, text_length=64, conditioning=(VaceControl(layers=1),), **WIDE),
        192,
        64,
    ),
}


def by_xla(config, tokens: int, text: int, *, backward: bool) -> float:
    graph, shapes = get_graph_def(config.make), get_param_shapes(config.make)

    def loss(params, row):
        return nnx.merge(graph, params)(**row)[0].sum()

    ids = jnp.ones((1, tokens), jnp.int32)
    own = (
        each.record(
            jax.ShapeDtypeStruct((1, tokens, *each.field.to_rows(config.patch).shape), jnp.float32),
            jnp.ones((1, 1, *each.strength_shape)),
        )
        for each in config.conditioning
    )
    row = {
        "noisy": jax.ShapeDtypeStruct((1, tokens, config.token_width), jnp.float32),
        "time": jax.ShapeDtypeStruct((1, 1), jnp.float32),
        "layout": PackedRows(segments=ids, positions=jnp.zeros((1, tokens, 3)), count=1),
        "conditioning": Conditioning(
            TextTokens(
                jax.ShapeDtypeStruct((1, text, config.context_width), jnp.float32), jnp.ones((1, text), jnp.int32)
            ),
            *own,
        ),
    }
    run = jax.value_and_grad(loss) if backward else loss
    return jax.jit(run).lower(shapes, row).cost_analysis()["flops"]


@pytest.mark.parametrize("name", mark_slow_except(["wan"], MODELS))
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_counted_flops_equal_those_of_xla(name, backward):
    config, tokens, text = MODELS[name]
    counted = (count_training_flops if backward else count_forward_flops)(config, [tokens], [text])
    assert by_xla(config, count_tokens(tokens), text, backward=backward) == pytest.approx(counted, rel=0.02)


def test_clips_of_a_row_do_not_attend_to_each_other():
    config = MODELS["cross"][0]
    apart, together = (count_attention_flops(config, clips, texts) for clips, texts in (([8, 8], [4, 4]), ([16], [8])))
    assert together == 2 * apart
    difference = count_forward_flops(config, [16], [4]) - 2 * count_forward_flops(config, [8], [2])
    conditions = count_forward_flops(config, [0], [0])
    assert (
        difference
        == count_attention_flops(config, [16], [4]) - 2 * count_attention_flops(config, [8], [2]) - conditions
    )


def test_pairs_of_a_pattern_are_counted_on_the_grid():
    frames = DiTConfig(channels=4, context_width=8, width=48, heads=2, pattern=SpaceOnly())
    assert count_attention_flops(frames, [Grid(4, 2, 2)], [0]) == 4 * 48 * frames.layers * 4 * 16
    both = SpatioTemporalDiTConfig(channels=4, context_width=8, width=48, heads=2)
    assert count_attention_flops(both, [Grid(4, 2, 2)], [0]) == 4 * 48 * both.layers * (4 * 16 + 4 * 16)
    with pytest.raises(UserError, match="grid"):
        count_forward_flops(frames, [16], [0])


def test_invalid_input_is_refused():
    with pytest.raises(UserError, match="2 clips need as many texts"):
        count_forward_flops(MODELS["wan"][0], [4, 4], [1])
    with pytest.raises(UserError, match="image_width"):
        count_forward_flops(MODELS["wan"][0], [4], [1], images=[3])
