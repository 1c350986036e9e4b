"""Models on a GPU: attention of long rows is cuDNN's, and nothing is as large as the scores."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dit_video.core.platform.devices import Platform
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import Partitioner, get_graph_def, get_param_shapes
from dit_video.tokens import PackedRows
from support.gpu_programs import list_kernels, lower_for_gpus
from support.marks import mark_slow_except

TOKENS, TEXT, COUNT = 2304, 640, 3
SMALL = {"channels": 4, "context_width": 8, "width": 32, "layers": 1, "heads": 2, "dtype": "bfloat16"}
WAN = WanDitConfig(**SMALL, mlp_dim=32, time_width=8, text_length=512)
DIT = DiTConfig(**SMALL)


@dataclasses.dataclass(frozen=True)
class HopperPartitioner(Partitioner):
    """A model on one Hopper GPU."""

    @property
    def platform(self) -> Platform:
        return Platform("gpu", (9, 0))


@pytest.mark.parametrize("config", [pytest.param(WAN, marks=pytest.mark.slow), DIT], ids=["Wan", "DiT"])
@pytest.mark.parametrize("count", mark_slow_except([COUNT], [COUNT, 1]))
def test_rows_of_any_number_of_clips_are_computed_without_a_mask(config, count):
    graph = get_graph_def(config.make, HopperPartitioner())
    segments = jnp.minimum(jnp.arange(TOKENS) // 700, count)[None]
    text_segments = 1 + jnp.arange(TEXT)[None] * count // TEXT

    def loss(params, noisy, text):
        layout = PackedRows(segments=segments, positions=jnp.zeros((1, TOKENS, 3)), count=count)
        conditioning = Conditioning(TextTokens(text, text_segments))
        return nnx.merge(graph, params)(noisy, jnp.zeros((1, count)), layout, conditioning)[0].sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, TOKENS, config.token_width), (1, TEXT, 8))]
    program = lower_for_gpus(jax.grad(loss), get_param_shapes(config.make), *shapes)
    kernels = list_kernels(program)
    assert set(kernels) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert {settings["max_seg_per_batch"] for settings in kernels.values()} == {count}
    calls = len(re.findall(r"__cudnn\$fmhaSoftmax\(", program))
    assert calls == 2  # self- and cross-attention
    assert f"{TOKENS}x{TOKENS}" not in program
    assert f"x{TOKENS}x{TEXT}" not in program
