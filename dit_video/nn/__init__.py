"""Layers: parameters in Flax NNX modules, computed with plain JAX."""

from dit_video.nn.attention import Attention, AttentionInputs, Backend, make_attention
from dit_video.nn.container import (
    check_params,
    complete_params,
    get_graph_def,
    get_param_shapes,
    init_params,
)
from dit_video.nn.conv import CausalConv, ConvCache, ConvForm, TemporalPadding, set_conv_form
from dit_video.nn.kernel import Kernel, is_kernel
from dit_video.nn.layers import (
    GroupNorm,
    Init,
    LayerNorm,
    Linear,
    RmsNorm,
    gelu,
    layer_norm,
    make_modulation_table,
    modulate,
    rms_norm,
    sinusoidal_embedding,
)
from dit_video.nn.lora import (
    LoraConfig,
    LowRankKernel,
    add_lora_scale,
    attach_lora,
    get_lora_changes,
    get_mergeable_changes,
    init_lora,
    merge_lora,
    merge_lora_in_place,
)
from dit_video.nn.partitioner import NO_DEVICE, ONE_DEVICE, Partitioner
from dit_video.nn.stack import LayerGroup, LayerWrapper, Remat, apply_stack, make_stack, rematerialize, scan_layers
