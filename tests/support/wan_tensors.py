"""Names and shapes of the tensors in the published folders of Wan, from their configs and without torch.

They are those of diffusers' and transformers' classes on the meta device
(`tests/families/wan/test_published_parity.py`). The division into files depends on their order, that of `state_dict` in
the versions that wrote the folders: attention's norms came before its linear maps there.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]
_Entries = Iterator[tuple[str, tuple[int, ...]]]


def make_transformer_shapes(config: Mapping[str, Any], *, has_added_query_norm: bool = False) -> Shapes:
    """Return the tensors of a `WanTransformer3DModel`, or of a `WanVACETransformer3DModel` if it has `vace_layers`.

    `has_added_query_norm` adds the norm that the I2V folders of Wan 2.1 have and today's class ignores.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, text, image = tuple(config["patch_size"]), config["text_dim"], config.get("image_dim")
    embedder = "condition_embedder"

    def list_entries() -> _Entries:
        yield "scale_shift_table", (1, 2, width)
        yield from _list_affine("patch_embedding", width, (config["in_channels"], *patch))
        if "vace_layers" in config:
            yield from _list_affine("vace_patch_embedding", width, (config["vace_in_channels"], *patch))
        yield from _list_affine(f"{embedder}.time_embedder.linear_1", width, (config["freq_dim"],))
        yield from _list_affine(f"{embedder}.time_embedder.linear_2", width, (width,))
        yield from _list_affine(f"{embedder}.time_proj", 6 * width, (width,))
        yield from _list_affine(f"{embedder}.text_embedder.linear_1", width, (text,))
        yield from _list_affine(f"{embedder}.text_embedder.linear_2", width, (width,))
        if image is not None:
            yield from _list_image_embedder(f"{embedder}.image_embedder", config, width)
        for layer in range(config["num_layers"]):
            yield from _list_block(f"blocks.{layer}", config, width, has_added_query_norm=has_added_query_norm)
        for number in range(len(config.get("vace_layers", ()))):
            yield from _list_block(f"vace_blocks.{number}", config, width, is_first=number == 0)
        yield from _list_affine("proj_out", config["out_channels"] * patch[0] * patch[1] * patch[2], (width,))

    return dict(list_entries())


def make_autoencoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the tensors of an `AutoencoderKLWan`; those of one file have no order."""
    width, multipliers, latents = config["base_dim"], config["dim_mult"], config["z_dim"]
    widths = [width, *(width * multiplier for multiplier in multipliers)]
    decoder_width = config.get("decoder_base_dim") or width
    decoder_widths = [decoder_width * multiplier for multiplier in (multipliers[-1], *reversed(multipliers))]
    colors, kernel = config.get("in_channels", 3), (3, 3, 3)

    def list_entries() -> _Entries:
        yield from _list_affine("encoder.conv_in", width, (colors, *kernel))
        yield from _list_encoder_levels(config, widths)
        yield from _list_middle("encoder.mid_block", widths[-1])
        yield "encoder.norm_out.gamma", (widths[-1], 1, 1, 1)
        yield from _list_affine("encoder.conv_out", 2 * latents, (widths[-1], *kernel))
        yield from _list_affine("quant_conv", 2 * latents, (2 * latents, 1, 1, 1))
        yield from _list_affine("post_quant_conv", latents, (latents, 1, 1, 1))
        yield from _list_affine("decoder.conv_in", decoder_widths[0], (latents, *kernel))
        yield from _list_middle("decoder.mid_block", decoder_widths[0])
        yield from _list_decoder_levels(config, decoder_widths)
        yield "decoder.norm_out.gamma", (decoder_widths[-1], 1, 1, 1)
        yield from _list_affine("decoder.conv_out", colors, (decoder_widths[-1], *kernel))

    return dict(list_entries())


def make_text_encoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the tensors of a saved `UMT5EncoderModel`: the embedding has one of its two names."""
    width, inner, mlp = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]

    def list_entries() -> _Entries:
        yield "shared.weight", (config["vocab_size"], width)
        for layer in range(config["num_layers"]):
            attention, block = f"encoder.block.{layer}.layer.0", f"encoder.block.{layer}.layer.1"
            for name in ("q", "k", "v"):
                yield f"{attention}.SelfAttention.{name}.weight", (inner, width)
            yield f"{attention}.SelfAttention.o.weight", (width, inner)
            buckets = config["relative_attention_num_buckets"]
            yield f"{attention}.SelfAttention.relative_attention_bias.weight", (buckets, config["num_heads"])
            yield f"{attention}.layer_norm.weight", (width,)
            for name in ("wi_0", "wi_1"):
                yield f"{block}.DenseReluDense.{name}.weight", (mlp, width)
            yield f"{block}.DenseReluDense.wo.weight", (width, mlp)
            yield f"{block}.layer_norm.weight", (width,)
        yield "encoder.final_layer_norm.weight", (width,)

    return dict(list_entries())


def make_image_encoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the tensors of a `CLIPVisionModel`, or of a `CLIPVisionModelWithProjection`, under its root."""
    width, mlp, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    root = "vision_model"

    def list_entries() -> _Entries:
        yield f"{root}.embeddings.class_embedding", (width,)
        yield f"{root}.embeddings.patch_embedding.weight", (width, 3, patch, patch)
        yield f"{root}.embeddings.position_embedding.weight", ((config["image_size"] // patch) ** 2 + 1, width)
        yield from _list_affine(f"{root}.pre_layrnorm", width)
        for layer in range(config["num_hidden_layers"]):
            block = f"{root}.encoder.layers.{layer}"
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                yield from _list_affine(f"{block}.self_attn.{name}", width, (width,))
            yield from _list_affine(f"{block}.layer_norm1", width)
            yield from _list_affine(f"{block}.mlp.fc1", mlp, (width,))
            yield from _list_affine(f"{block}.mlp.fc2", width, (mlp,))
            yield from _list_affine(f"{block}.layer_norm2", width)
        yield from _list_affine(f"{root}.post_layernorm", width)
        if config["architectures"] == ["CLIPVisionModelWithProjection"]:
            yield "visual_projection.weight", (config["projection_dim"], width)

    return dict(list_entries())


def _list_affine(name: str, width: int, inputs: tuple[int, ...] = ()) -> _Entries:
    """Yield the weight and the bias of a convolution, a linear map, or (without inputs) a norm."""
    yield f"{name}.weight", (width, *inputs)
    yield f"{name}.bias", (width,)


# The transformer.


def _list_image_embedder(name: str, config: Mapping[str, Any], width: int) -> _Entries:
    image = config["image_dim"]
    if config.get("pos_embed_seq_len") is not None:
        yield f"{name}.pos_embed", (1, config["pos_embed_seq_len"], image)
    yield from _list_affine(f"{name}.norm1", image)
    yield from _list_affine(f"{name}.ff.net.0.proj", image, (image,))
    yield from _list_affine(f"{name}.ff.net.2", width, (image,))
    yield from _list_affine(f"{name}.norm2", width)


def _list_block(
    name: str,
    config: Mapping[str, Any],
    width: int,
    *,
    is_first: bool = False,
    has_added_query_norm: bool = False,
) -> _Entries:
    """Yield the tensors of a block; those of VACE end in a projection, and the first begins with one."""
    is_control = name.startswith("vace_")
    yield f"{name}.scale_shift_table", (1, 6, width)
    if is_first:
        yield from _list_affine(f"{name}.proj_in", width, (width,))
    for attention in ("attn1", "attn2"):
        yield f"{name}.{attention}.norm_q.weight", (width,)
        yield f"{name}.{attention}.norm_k.weight", (width,)
        for part in ("to_q", "to_k", "to_v"):
            yield from _list_affine(f"{name}.{attention}.{part}", width, (width,))
        has_image = attention == "attn2" and config.get("added_kv_proj_dim") is not None and not is_control
        for part in ("add_k_proj", "add_v_proj") if has_image else ():
            yield from _list_affine(f"{name}.attn2.{part}", width, (config["added_kv_proj_dim"],))
        yield from _list_affine(f"{name}.{attention}.to_out.0", width, (width,))
        if has_image and has_added_query_norm:
            yield f"{name}.attn2.norm_added_q.weight", (width,)
        if has_image:
            yield f"{name}.attn2.norm_added_k.weight", (width,)
    yield from _list_affine(f"{name}.norm2", width)
    yield from _list_affine(f"{name}.ffn.net.0.proj", config["ffn_dim"], (width,))
    yield from _list_affine(f"{name}.ffn.net.2", width, (config["ffn_dim"],))
    if is_control:
        yield from _list_affine(f"{name}.proj_out", width, (width,))


# The autoencoder.


def _list_encoder_levels(config: Mapping[str, Any], widths: list[int]) -> _Entries:
    number, is_residual, last = 0, config.get("is_residual", False), len(widths) - 2
    for level, (before, after) in enumerate(itertools.pairwise(widths)):
        for block in range(config["num_res_blocks"]):
            name = f"{level}.resnets.{block}" if is_residual else str(number)
            yield from _list_residual(f"encoder.down_blocks.{name}", after if block else before, after)
            number += 1
        if level < last:
            name = f"{level}.downsampler" if is_residual else str(number)
            yield from _list_affine(f"encoder.down_blocks.{name}.resample.1", after, (after, 3, 3))
            if config["temperal_downsample"][level]:
                yield from _list_affine(f"encoder.down_blocks.{name}.time_conv", after, (after, 3, 1, 1))
            number += 1


def _list_decoder_levels(config: Mapping[str, Any], widths: list[int]) -> _Entries:
    is_residual, last = config.get("is_residual", False), len(widths) - 2
    upsamples = config["temperal_downsample"][::-1]
    for level, (before, after) in enumerate(itertools.pairwise(widths)):
        # Without shortcuts between levels, upsampling has halved the channels.
        inputs = before // 2 if level and not is_residual else before
        root = f"decoder.up_blocks.{level}"
        for block in range(config["num_res_blocks"] + 1):
            yield from _list_residual(f"{root}.resnets.{block}", after if block else inputs, after)
        if level < last:
            name = f"{root}.upsampler" if is_residual else f"{root}.upsamplers.0"
            yield from _list_affine(f"{name}.resample.1", after if is_residual else after // 2, (after, 3, 3))
            if upsamples[level]:
                yield from _list_affine(f"{name}.time_conv", 2 * after, (after, 3, 1, 1))


def _list_residual(name: str, before: int, after: int) -> _Entries:
    yield f"{name}.norm1.gamma", (before, 1, 1, 1)
    yield from _list_affine(f"{name}.conv1", after, (before, 3, 3, 3))
    yield f"{name}.norm2.gamma", (after, 1, 1, 1)
    yield from _list_affine(f"{name}.conv2", after, (after, 3, 3, 3))
    if before != after:
        yield from _list_affine(f"{name}.conv_shortcut", after, (before, 1, 1, 1))


def _list_middle(name: str, width: int) -> _Entries:
    yield f"{name}.attentions.0.norm.gamma", (width, 1, 1)
    yield from _list_affine(f"{name}.attentions.0.to_qkv", 3 * width, (width, 1, 1))
    yield from _list_affine(f"{name}.attentions.0.proj", width, (width, 1, 1))
    for number in range(2):
        yield from _list_residual(f"{name}.resnets.{number}", width, width)
