"""Layers: parameters in Flax NNX modules, computed with plain JAX."""

from dit_video.nn.activations import gelu
from dit_video.nn.attention import Attention, AttentionInputs, Backend, make_attention
from dit_video.nn.container import (
    check_params,
    complete_params,
    get_graph_def,
    get_param_shapes,
    init_params,
)
from dit_video.nn.conv import CausalConv, ConvCache, ConvForm, TemporalPadding, set_conv_form
from dit_video.nn.embeddings import sinusoidal_embedding
from dit_video.nn.linear import Init, Linear
from dit_video.nn.lora import (
    LoraConfig,
    LowRankKernel,
    add_lora_scale,
    attach_lora,
    get_lora_changes,
    init_lora,
    merge_lora,
    merge_lora_in_place,
)
from dit_video.nn.modulation import make_modulation_table, modulate
from dit_video.nn.norms import GroupNorm, LayerNorm, RmsNorm, layer_norm, rms_norm
from dit_video.nn.parallel import NO_DEVICE, ONE_DEVICE, Parallelism
from dit_video.nn.stack import LayerGroup, LayerWrapper, Remat, apply_stack, make_stack, rematerialize, scan_layers
