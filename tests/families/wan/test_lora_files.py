"""Names in published LoRA files of Wan, and their values against diffusers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.families.wan.pipeline import DENOISER
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import get_param_shapes, merge_lora
from dit_video.weights import load_lora, save, save_lora
from dit_video.weights.lora import match_tensors
from support.random_params import make_random_params

LINEAR = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v")
LINEAR += ("cross_attn.o",)
NORMS = ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k")


def list_distilled(config, *, rank=32, image=False, large=1_000_000):
    """Return names and shapes in LightX2V's file of a model distilled to four steps without guidance.

    Kijai's `lightx2v_T2V_14B_cfg_step_distill` and `lightx2v_I2V_14B_480p_cfg_step_distill` have factors of large
    kernels, and full differences of all other parameters: those of vectors and of less than a million values, as
    LightX2V's `tools/extract/lora_extractor.py` writes them (`diff`, `diff_b`, `diff_m`). Users' logs name the same:
    `blocks.0.diff_m` (ComfyUI-WanVideoWrapper, issue 807), `cross_attn.norm_k_img.diff` and `cross_attn.k_img.diff_b`
    (issue 940), `img_emb.proj` (LightX2V, issue 1246), `head.head.diff` (diffusers' `lora_conversion_utils.py`).
    """
    width, names = config.width, {}

    def add(name, outputs, inputs):
        if outputs * inputs < large:
            names[f"{name}.diff"] = (outputs, inputs)
        else:
            names[f"{name}.lora_down.weight"], names[f"{name}.lora_up.weight"] = (rank, inputs), (outputs, rank)
        names[f"{name}.diff_b"] = (outputs,)

    for layer in range(config.layers):
        block = f"blocks.{layer}"
        for name in (*LINEAR, *(("cross_attn.k_img", "cross_attn.v_img") if image else ())):
            add(f"{block}.{name}", width, width)
        add(f"{block}.ffn.0", config.mlp_dim, width)
        add(f"{block}.ffn.2", width, config.mlp_dim)
        for name in (*NORMS, *(("cross_attn.norm_k_img",) if image else ())):
            names[f"{block}.{name}.diff"] = (width,)
        names |= {f"{block}.norm3.diff": (width,), f"{block}.norm3.diff_b": (width,)}
        names[f"{block}.diff_m"] = (1, 6, width)
    for name, outputs, inputs in (
        ("text_embedding.0", width, config.context_width),
        ("text_embedding.2", width, width),
        ("time_embedding.0", width, config.time_width),
        ("time_embedding.2", width, width),
        ("time_projection.1", 6 * width, width),
        ("head.head", 4 * config.channels, width),
    ):
        add(name, outputs, inputs)
    names |= {"head.diff_m": (1, 2, width), "patch_embedding.diff_b": (width,)}
    names["patch_embedding.diff"] = (width, config.channels + (20 if image else 0), 1, 2, 2)
    if image:
        for name, size in (("img_emb.proj.0", 1280), ("img_emb.proj.4", width)):
            names |= {f"{name}.diff": (size,), f"{name}.diff_b": (size,)}
        add("img_emb.proj.1", 1280, 1280)
        add("img_emb.proj.3", width, 1280)
    return {f"diffusion_model.{name}": shape for name, shape in names.items()}


def list_extracted(config, *, rank=32):
    """Return names and shapes in Kijai's files of CausVid and AccVideo (`Wan21_CausVid_14B_T2V_lora_rank32`, …).

    They have factors of all kernels but those of the patch embedding and the projected time, and differences of biases
    and norms, as trainings read them that start with these files, and as diffusers' `lora_conversion_utils.py` does.
    """
    names = {}
    for name, shape in list_distilled(config, rank=rank, large=0).items():
        is_left_out = (
            name.endswith(".diff_m") or name.endswith("patch_embedding.diff") or ".time_projection.1.lora" in name
        )
        names |= {} if is_left_out else {name: shape}
    return names


def match(names, config):
    """Match names and shapes to a model, without any values."""
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in names.items()}
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(get_param_shapes(config.make)).items()}
    return match_tensors(Path("lora.safetensors"), arrays, shapes, DENOISER.get_lora_modules(config))


@pytest.mark.parametrize("kind", ["distilled", "distilled for images", "extracted"])
def test_every_tensor_of_published_loras_belongs_to_a_module(kind):
    image = kind == "distilled for images"
    config = WanDitConfig.i2v_14b() if image else WanDitConfig.t2v_14b()
    names = list_extracted(config) if kind == "extracted" else list_distilled(config, image=image)
    matches = match(names, config)
    assert matches.left_out == []
    assert {name for parts in matches.modules.values() for name in parts.values()} == names.keys()


def test_a_lora_of_image_to_video_changes_other_models_but_for_the_image():
    """Wan 2.2 I2V has no image tokens, and T2V fewer input channels; users load these files into both."""
    names = list_distilled(WanDitConfig.i2v_14b(), image=True)
    image_modules = {name for name in names if "_img" in name or "img_emb" in name}
    assert set(match(names, WanDitConfig.i2v_14b(image_width=None)).left_out) == image_modules
    left_out = set(match(names, WanDitConfig.t2v_14b()).left_out)
    assert left_out == image_modules | {"diffusion_model.patch_embedding.diff"}


def test_a_lora_of_another_size_is_refused_with_the_names_that_do_not_fit():
    names = list_distilled(WanDitConfig.t2v_14b())
    message = r"misshapen \(.*blocks.0.self_attn.q.*\[32, 5120\] instead of \[32, 1536\].*use a LoRA of this model"
    with pytest.raises(UserError, match=message):
        match(names, WanDitConfig.t2v_1_3b())
    with pytest.raises(UserError, match=r"unexpected \(.*blocks.30.*use a LoRA of this model"):
        match(names, WanDitConfig.t2v_14b(layers=30))


@pytest.mark.parity
def test_diffusers_reads_the_biases_that_are_written_here(tmp_path):
    """Not all modules have one, and the scale is not 1."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    config = WanDitConfig(channels=4, context_width=24, width=24, mlp_dim=32, layers=2, heads=2, time_width=24)
    params, noise, tensors = make_random_params(config.make), np.random.default_rng(0), {}
    for name, outputs in (("blocks.0.self_attn.q", 24), ("blocks.1.self_attn.q", 24), ("blocks.1.ffn.0", 32)):
        shapes = {"lora_down.weight": (3, 24), "lora_up.weight": (outputs, 3), "diff_b": (outputs,)}
        tensors |= {f"{name}.{part}": noise.normal(size=shape).astype(np.float32) for part, shape in shapes.items()}
        tensors[f"{name}.alpha"] = np.asarray(6, np.float32)
    del tensors["blocks.0.self_attn.q.diff_b"]
    save(tmp_path / "theirs.safetensors", tensors)
    modules = DENOISER.get_lora_modules(config)
    lora = load_lora(tmp_path / "theirs.safetensors", params, modules)
    save_lora(tmp_path / "lora.safetensors", lora, modules)

    DENOISER.save(tmp_path / "transformer", config, params)
    transformer = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    file = str(tmp_path / "lora.safetensors")
    state, metadata = diffusers.WanPipeline.lora_state_dict(file, return_lora_metadata=True)
    diffusers.WanPipeline.load_lora_into_transformer(state, transformer, adapter_name="a", metadata=metadata)
    transformer.set_adapters(["a"], [0.7])
    with torch.no_grad():
        transformer.fuse_lora()
    transformer.unload_lora()
    DENOISER.save(tmp_path / "merged", config, merge_lora(params, lora, 0.7))
    merged = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "merged").state_dict()
    for name, leaf in transformer.state_dict().items():
        np.testing.assert_allclose(leaf.numpy(), merged[name].numpy(), atol=1e-5, err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["distilled", "extracted"])
def test_diffusers_applies_the_same_to_what_it_applies(tmp_path, kind):
    """diffusers drops differences of norms, modulation and the patch embedding, and of a bias alone for the time."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    config = WanDitConfig(channels=4, context_width=24, width=24, mlp_dim=32, layers=2, heads=2, time_width=24)
    params = make_random_params(config.make)
    DENOISER.save(tmp_path / "transformer", config, params)
    transformer = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    before = {name: tensor.numpy().copy() for name, tensor in transformer.state_dict().items()}
    # Only the head's kernel has less than 500 values.
    names = list_extracted(config, rank=3) if kind == "extracted" else list_distilled(config, rank=3, large=500)
    noise = np.random.default_rng(0)
    tensors = {name: (0.2 * noise.normal(size=shape)).astype(np.float32) for name, shape in names.items()}
    tensors |= {f"diffusion_model.blocks.{layer}.self_attn.q.alpha": np.asarray(6, np.float32) for layer in (0, 1)}
    save(tmp_path / "lora.safetensors", tensors)

    state = diffusers.WanPipeline.lora_state_dict(str(tmp_path / "lora.safetensors"))
    diffusers.WanPipeline.load_lora_into_transformer(state, transformer, adapter_name="distilled")
    transformer.set_adapters(["distilled"], [0.7])
    with torch.no_grad():
        transformer.fuse_lora()
    transformer.unload_lora()
    after = {name: tensor.numpy() for name, tensor in transformer.state_dict().items()}

    lora = load_lora(tmp_path / "lora.safetensors", params, DENOISER.get_lora_modules(config))
    DENOISER.save(tmp_path / "merged", config, merge_lora(params, lora, 0.7))
    merged = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "merged").state_dict()
    for name, leaf in merged.items():
        ours, theirs = (np.abs(each - before[name]).max() for each in (leaf.numpy(), after[name]))
        if any(part in name for part in ("norm", "scale_shift_table", "patch_embedding", "time_proj")) and not theirs:
            is_in_file = kind == "distilled" or not name.endswith(
                ("scale_shift_table", "embedding.weight", "proj.weight")
            )
            assert (ours > 0.01) == is_in_file, name
        else:
            assert theirs > 0.01, name
            np.testing.assert_allclose(leaf.numpy(), after[name], atol=1e-5, err_msg=name)


def test_files_with_and_without_image_tokens_have_modules_of_the_same_names():
    plain = WanDitConfig.t2v_1_3b()
    modules = DENOISER.get_lora_modules(plain)
    assert modules.keys() == DENOISER.get_lora_modules(replace(plain, image_width=8, image_positions=4)).keys()
    assert {name for name, module in modules.items() if module.path is None} >= {
        "blocks.0.cross_attn.k_img",
        "blocks.0.attn2.add_k_proj",
        "img_emb.proj.1",
    }
