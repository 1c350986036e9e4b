"""The published folders of Wan in diffusers' layout: their JSON files, and their weight files without the weights.

The transformers, autoencoders, encoders and schedulers are those that diffusers' `scripts/convert_wan_to_diffusers.py`
writes (huggingface/diffusers 58eb52c; for Wan 2.1 the versions 2d8a41cae8, 5873377a66 and 73a9d5856f of the file, with
the defaults that the classes had then). `tests/families/wan/test_published_folders.py` compares bytes with those of the
hub where an inventory of them is public.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from support.wan_tensors import (
    make_autoencoder_shapes,
    make_image_encoder_shapes,
    make_text_encoder_shapes,
    make_transformer_shapes,
)
from support.weight_skeleton import Shapes, write_document, write_skeleton

Document = dict[str, Any]


class Weights(NamedTuple):
    """Weight files of a part."""

    shapes: Shapes
    dtype: Literal["F32", "BF16"] = "F32"
    stem: str = "diffusion_pytorch_model"
    shard_bytes: int = 5_000_000_000


class PublishedFolder(NamedTuple):
    """A published folder."""

    documents: Mapping[str, Document]
    """Contents of its JSON files, by path."""
    weights: Mapping[str, Weights]
    """Weight files, by the part's folder."""


_MEAN_2_1 = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
_MEAN_2_1 += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
_STD_2_1 = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
_STD_2_1 += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]
_MEAN_2_2 = [
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
]
_STD_2_2 = [
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
]
_VAE: Document = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": _MEAN_2_1,
    "latents_std": _STD_2_1,
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_LATER_VAE_SETTINGS = {
    "decoder_base_dim": None,
    "in_channels": 3,
    "is_residual": False,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}
"""Settings that the class got with Wan 2.2."""
_TI2V_VAE_SETTINGS = {
    "base_dim": 160,
    "clip_output": False,  # no argument of the class
    "decoder_base_dim": 256,
    "in_channels": 12,
    "is_residual": True,
    "latents_mean": _MEAN_2_2,
    "latents_std": _STD_2_2,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "z_dim": 48,
}
_TRANSFORMER: Document = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
_SMALL = {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}
_LARGE = {"ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40}
_MEDIUM = {"ffn_dim": 14336, "num_attention_heads": 24, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_IMAGE = {"added_kv_proj_dim": 5120, "image_dim": 1280, "in_channels": 36}
_SMALL_VACE = {"vace_in_channels": 96, "vace_layers": list(range(0, 30, 2))}
_LARGE_VACE = {"vace_in_channels": 96, "vace_layers": list(range(0, 40, 5))}
_SCHEDULER: Document = {
    "_class_name": "UniPCMultistepScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
_TEXT_ENCODER: Document = {
    "_name_or_path": "google/umt5-xxl",
    "architectures": ["UMT5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "umt5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "scalable_attention": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
    "transformers_version": "4.48.0.dev0",
    "use_cache": True,
    "vocab_size": 256384,
}
_IMAGE_ENCODER: Document = {
    "_name_or_path": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "architectures": ["CLIPVisionModelWithProjection"],
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
}
_IMAGE_PROCESSOR: Document = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "CLIPProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}


def _make_folder(
    pipeline: str,
    *,
    version: str,
    transformer: Mapping[str, Any],
    flow_shift: float = 3.0,
    text_dtype: Literal["F32", "BF16"] = "F32",
    has_added_query_norm: bool = False,
    index: Mapping[str, Any] | None = None,
) -> PublishedFolder:
    """Return a folder; `index` holds what `model_index.json` has since Wan 2.2, and nothing before."""
    is_later, has_image = index is not None, "image_dim" in transformer
    stamp, index = {"_diffusers_version": version}, dict(index or {})
    config = _TRANSFORMER | stamp | ({"pos_embed_seq_len": None} if is_later else {}) | dict(transformer)
    if "vace_layers" in config:
        config["_class_name"] = "WanVACETransformer3DModel"
    is_ti2v = bool(index.get("expand_timesteps"))
    vae = _VAE | stamp | (_LATER_VAE_SETTINGS if is_later else {}) | (_TI2V_VAE_SETTINGS if is_ti2v else {})
    later_scheduler = {"time_shift_type": "exponential", "use_dynamic_shifting": False} if is_later else {}
    text = _TEXT_ENCODER | {"torch_dtype": {"F32": "float32", "BF16": "bfloat16"}[text_dtype]}
    documents = {
        "scheduler/scheduler_config.json": _SCHEDULER | stamp | {"flow_shift": flow_shift} | later_scheduler,
        "text_encoder/config.json": text,
        "transformer/config.json": config,
        "vae/config.json": vae,
    }
    shapes = make_transformer_shapes(config, has_added_query_norm=has_added_query_norm)
    weights = {
        "text_encoder": Weights(make_text_encoder_shapes(text), text_dtype, "model"),
        "transformer": Weights(shapes),
        "vae": Weights(make_autoencoder_shapes(vae), shard_bytes=10_000_000_000),
    }
    parts = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", config["_class_name"]],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if index.get("boundary_ratio") is not None:
        parts["transformer_2"] = parts["transformer"]
        documents["transformer_2/config.json"] = config
        weights["transformer_2"] = weights["transformer"]
    if has_image:
        parts |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
        parts |= {"image_processor": ["transformers", "CLIPProcessor"]}
        documents |= {"image_encoder/config.json": _IMAGE_ENCODER}
        documents |= {"image_processor/preprocessor_config.json": _IMAGE_PROCESSOR}
        weights["image_encoder"] = Weights(make_image_encoder_shapes(_IMAGE_ENCODER), "BF16", "model")
    documents["model_index.json"] = {"_class_name": pipeline} | stamp | index | parts
    return PublishedFolder(documents, weights)


_T2V, _I2V, _VACE = "WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"
_ONE_EXPERT = {"boundary_ratio": None, "transformer_2": [None, None]}
_NO_IMAGE_ENCODER = {"image_encoder": [None, None], "image_processor": [None, None]}
_V33, _V34, _V35 = "0.33.0.dev0", "0.34.0.dev0", "0.35.0.dev0"
_FIRST_AND_LAST = {"pos_embed_seq_len": 2 * 257}
FOLDERS: dict[str, PublishedFolder] = {
    "Wan2.1-T2V-1.3B-Diffusers": _make_folder(_T2V, version=_V33, transformer=_SMALL),
    "Wan2.1-T2V-14B-Diffusers": _make_folder(_T2V, version=_V33, transformer=_LARGE),
    "Wan2.1-I2V-14B-480P-Diffusers": _make_folder(
        _I2V, version=_V33, transformer=_LARGE | _IMAGE, has_added_query_norm=True
    ),
    "Wan2.1-I2V-14B-720P-Diffusers": _make_folder(
        _I2V, version=_V33, transformer=_LARGE | _IMAGE, flow_shift=5.0, has_added_query_norm=True
    ),
    "Wan2.1-FLF2V-14B-720P-diffusers": _make_folder(
        _I2V, version=_V33, transformer=_LARGE | _IMAGE | _FIRST_AND_LAST, flow_shift=16.0
    ),
    "Wan2.1-VACE-1.3B-diffusers": _make_folder(
        _VACE, version=_V34, transformer={**_SMALL, "pos_embed_seq_len": None, **_SMALL_VACE}, text_dtype="BF16"
    ),
    "Wan2.1-VACE-14B-diffusers": _make_folder(
        _VACE, version=_V34, transformer={**_LARGE, "pos_embed_seq_len": None, **_LARGE_VACE}, text_dtype="BF16"
    ),
    "Wan2.2-T2V-A14B-Diffusers": _make_folder(
        _T2V,
        version=_V35,
        transformer=_LARGE,
        text_dtype="BF16",
        index={"boundary_ratio": 0.875, "expand_timesteps": False},
    ),
    "Wan2.2-I2V-A14B-Diffusers": _make_folder(
        _I2V,
        version=_V35,
        transformer=_LARGE | {"in_channels": 36},
        text_dtype="BF16",
        index={"boundary_ratio": 0.9, "expand_timesteps": False, **_NO_IMAGE_ENCODER},
    ),
    "Wan2.2-TI2V-5B-Diffusers": _make_folder(
        _T2V,
        version=_V35,
        transformer=_MEDIUM,
        flow_shift=5.0,
        text_dtype="BF16",
        index={"expand_timesteps": True, **_ONE_EXPERT},
    ),
}
"""The published folders, by the name of their repository below `Wan-AI/` on the Hugging Face hub.

The `flow_shift` of I2V-14B-720P is that of README.md of Wan-Video/Wan2.1 ("5.0 for 720P, 3.0 for 480P")."""


def write_published_folder(folder: Path, name: str) -> None:
    """Write a published folder, with zeros that take no room as weights, and without the tokenizer's vocabulary."""
    published = FOLDERS[name]
    for path, document in published.documents.items():
        write_document(folder / path, document)
    for part, weights in published.weights.items():
        write_skeleton(
            folder / part, weights.stem, weights.shapes, dtype=weights.dtype, shard_bytes=weights.shard_bytes
        )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
