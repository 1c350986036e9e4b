"""Layers: parameters in Flax NNX modules, computed with plain JAX."""

from dit_video.nn.activations import gelu
from dit_video.nn.attention import Attention, Backend, Tokens, make_attention
from dit_video.nn.container import Make, checked_params, completed_params, graph_of, init_params, param_shapes
from dit_video.nn.conv import CausalConv, Form, Memory, Past, choose_form, with_past
from dit_video.nn.embeddings import sinusoidal
from dit_video.nn.linear import Fused, Init, Linear, Placed
from dit_video.nn.lora import LoraConfig, LowRank, attach_lora, init_lora, merge_lora, scaled
from dit_video.nn.modulation import modulate
from dit_video.nn.norms import GroupNorm, LayerNorm, RmsNorm, layer_norm
from dit_video.nn.stack import Remat, Turns, apply_groups, apply_stack, make_stack, rematerialised

__all__ = [
    "Attention",
    "Backend",
    "CausalConv",
    "Form",
    "Fused",
    "GroupNorm",
    "Init",
    "LayerNorm",
    "Linear",
    "LoraConfig",
    "LowRank",
    "Make",
    "Memory",
    "Past",
    "Placed",
    "Remat",
    "RmsNorm",
    "Tokens",
    "Turns",
    "apply_groups",
    "apply_stack",
    "attach_lora",
    "checked_params",
    "choose_form",
    "completed_params",
    "gelu",
    "graph_of",
    "init_lora",
    "init_params",
    "layer_norm",
    "make_attention",
    "make_stack",
    "merge_lora",
    "modulate",
    "param_shapes",
    "rematerialised",
    "scaled",
    "sinusoidal",
    "with_past",
]
