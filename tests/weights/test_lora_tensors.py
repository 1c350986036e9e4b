"""Full differences of weights and biases in files of adapters."""

from pathlib import Path

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.nn import attach_lora, merge_lora
from dit_video.weights import LoraModule, load, load_lora, save, save_lora
from dit_video.weights.lora import add_module_prefix
from dit_video.weights.tensor_map import TensorMapping

NOISE = np.random.default_rng(0)


def draw(*shape):
    return NOISE.normal(size=shape).astype(np.float32)


PARAMS = {
    "embed": {"kernel": draw(8, 6), "bias": draw(6)},
    "blocks": {
        "qk": {"kernel": draw(3, 6, 10), "bias": draw(3, 10)},
        "norm": {"scale": draw(3, 6), "shift": draw(3, 6)},
        "table": draw(3, 2, 6),
    },
}
PATCH = TensorMapping("", "o c h w -> (h w c) o", (("h", 2), ("w", 2)))
TABLE = TensorMapping("", "1 n d -> n d", layers=3)
ORDER = (0, 2, 1, 3)
MODULES = {"patch_embedding": LoraModule("embed/kernel", mapping=PATCH), "img_emb.proj": LoraModule(None)}
for layer in range(3):
    MODULES |= {
        f"blocks.{layer}.attn.q": LoraModule("blocks/qk/kernel", layer, (0, 4), ORDER),
        f"blocks.{layer}.attn.k": LoraModule("blocks/qk/kernel", layer, (4, 10)),
        f"blocks.{layer}.norm": LoraModule("blocks/norm/scale", layer, mapping=TensorMapping("", layers=3)),
        f"blocks.{layer}.modulation": LoraModule("blocks/table", layer, mapping=TABLE),
    }

TENSORS = {
    "diffusion_model.patch_embedding.diff": draw(6, 2, 2, 2),
    "diffusion_model.patch_embedding.diff_b": draw(6),
    "diffusion_model.blocks.1.attn.q.diff": draw(4, 6),
    "diffusion_model.blocks.1.attn.q.diff_b": draw(4),
    "diffusion_model.blocks.1.attn.k.lora_down.weight": draw(2, 6),
    "diffusion_model.blocks.1.attn.k.lora_up.weight": draw(6, 2),
    "diffusion_model.blocks.1.attn.k.diff_b": draw(6),
    "diffusion_model.blocks.2.norm.diff": draw(6),
    "diffusion_model.blocks.2.norm.diff_b": draw(6),
    "diffusion_model.blocks.0.diff_m": draw(1, 2, 6),
}


def add_by_hand(weight):
    """Return the parameters after all changes of the tensors."""
    leaves = {path: leaf.copy() for path, leaf in flatten(PARAMS).items()}
    part = {name.removeprefix("diffusion_model."): weight * array for name, array in TENSORS.items()}
    leaves["embed/kernel"] += part["patch_embedding.diff"].transpose(2, 3, 1, 0).reshape(8, 6)
    leaves["embed/bias"] += part["patch_embedding.diff_b"]
    leaves["blocks/qk/kernel"][1, :, :4] += part["blocks.1.attn.q.diff"].T[:, ORDER]
    leaves["blocks/qk/bias"][1, :4] += part["blocks.1.attn.q.diff_b"][[*ORDER]]
    up, down = part["blocks.1.attn.k.lora_up.weight"], TENSORS["diffusion_model.blocks.1.attn.k.lora_down.weight"]
    leaves["blocks/qk/kernel"][1, :, 4:] += (up @ down).T
    leaves["blocks/qk/bias"][1, 4:] += part["blocks.1.attn.k.diff_b"]
    leaves["blocks/norm/scale"][2] += part["blocks.2.norm.diff"]
    leaves["blocks/norm/shift"][2] += part["blocks.2.norm.diff_b"]
    leaves["blocks/table"][0] += part["blocks.0.diff_m"][0]
    return leaves


def rename(tensors, style):
    """Return tensors of the names of ComfyUI, or of kohya."""
    if style == "comfyui":
        return tensors
    kinds = ("lora_down.weight", "lora_up.weight", "diff_m", "diff_b", "diff")
    renamed = {}
    for name, array in tensors.items():
        kind = next(kind for kind in kinds if name.endswith(f".{kind}"))
        module = name.removeprefix("diffusion_model.").removesuffix(f".{kind}").replace(".", "_")
        renamed[f"lora_unet_{module}.{kind}"] = array
    return renamed


@pytest.mark.parametrize("style", ["comfyui", "kohya"])
@pytest.mark.parametrize("change", [merge_lora, attach_lora])
def test_differences_are_added_to_weights_and_biases(tmp_path, style, change):
    save(tmp_path / "a.safetensors", rename(TENSORS, style))
    lora = load_lora(tmp_path / "a.safetensors", PARAMS, MODULES)
    if change is attach_lora:  # the factors are multiplied in the layer
        lora["blocks"]["qk"]["kernel"]["a"] *= 0
    result, expected = flatten(change(PARAMS, lora, 0.5)), add_by_hand(0.5)
    for path, leaf in expected.items():
        if change is attach_lora and path == "blocks/qk/kernel":
            path, leaf = f"{path}/kernel", leaf[..., :4]
        np.testing.assert_allclose(result[path][..., : leaf.shape[-1]], leaf, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("style", ["comfyui", "kohya"])
def test_saved_differences_come_back_under_their_names(tmp_path, style):
    save(tmp_path / "a.safetensors", rename(TENSORS, style))
    prefixed, params = add_module_prefix(MODULES, "backbone"), {"backbone": PARAMS}
    lora = load_lora(tmp_path / "a.safetensors", params, prefixed)
    save_lora(tmp_path / "b.safetensors", lora, prefixed, style=style)
    written = load(tmp_path / "b.safetensors")
    alphas = {name for name in written if name.endswith(".alpha")}
    assert written.keys() - alphas == rename(TENSORS, style).keys()
    for name, array in rename(TENSORS, style).items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    with pytest.raises(UserError, match=r"no names for adapters of .*backbone/embed/kernel.*Use style='comfyui'"):
        save_lora(tmp_path / "c.safetensors", lora, prefixed)


def test_a_bias_without_factors_of_its_module_has_no_name_in_diffusers(tmp_path):
    """Modules of other layers have factors, and their biases names."""
    pair = {"q.lora_down.weight": draw(2, 6), "q.lora_up.weight": draw(4, 2), "q.diff_b": draw(4)}
    tensors = {f"diffusion_model.blocks.1.attn.{name}": array for name, array in pair.items()}
    save(tmp_path / "a.safetensors", tensors)
    save_lora(tmp_path / "b.safetensors", load_lora(tmp_path / "a.safetensors", PARAMS, MODULES), MODULES)
    (bias,) = (array for name, array in load(tmp_path / "b.safetensors").items() if name.endswith(".bias"))
    np.testing.assert_array_equal(bias, tensors["diffusion_model.blocks.1.attn.q.diff_b"])
    save(tmp_path / "a.safetensors", tensors | {"diffusion_model.blocks.0.attn.q.diff_b": draw(4)})
    lora = load_lora(tmp_path / "a.safetensors", PARAMS, MODULES)
    with pytest.raises(UserError, match=r"no names for adapters of blocks/qk/bias. Use style='comfyui'"):
        save_lora(tmp_path / "c.safetensors", lora, MODULES)


def test_factors_of_a_convolution_are_those_of_its_kernel(tmp_path):
    down, up = draw(2, 2, 2, 2), draw(6, 2, 1, 1)
    names = ("patch_embedding.lora_A.weight", "patch_embedding.lora_B.weight")
    save(tmp_path / "a.safetensors", dict(zip(names, (down, up), strict=True)))
    merged = merge_lora(PARAMS, load_lora(tmp_path / "a.safetensors", PARAMS, MODULES))
    change = np.einsum("or,rchw->hwco", up[:, :, 0, 0], down).reshape(8, 6)
    np.testing.assert_allclose(merged["embed"]["kernel"], PARAMS["embed"]["kernel"] + change, atol=1e-5)


def test_what_only_other_models_of_the_family_have_is_left_out_and_named(tmp_path):
    others = {
        "diffusion_model.img_emb.proj.lora_down.weight": draw(2, 6),
        "diffusion_model.img_emb.proj.lora_up.weight": draw(6, 2),
        "diffusion_model.img_emb.proj.diff_b": np.zeros(6, np.float32),  # changes nothing
        "diffusion_model.patch_embedding.diff": draw(6, 5, 2, 2),  # of a model with more input channels
    }
    save(tmp_path / "a.safetensors", TENSORS | others)
    with pytest.warns(UserWarning, match="left out") as caught:
        lora = load_lora(tmp_path / "a.safetensors", PARAMS, MODULES)
    message = str(caught[0].message)
    assert "3 tensors are left out" in message
    assert all((name in message) == array.any() for name, array in others.items())
    assert "embed/kernel/diff" not in flatten(lora)
    np.testing.assert_array_equal(lora["embed"]["bias"]["diff"], TENSORS["diffusion_model.patch_embedding.diff_b"])


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("blocks.1.attn.q.diff", draw(4, 5), r"blocks.1.attn.q.diff \[4, 5\] instead of \[4, 6\]"),
        ("blocks.1.attn.q.diff_b", draw(5), r"blocks.1.attn.q.diff_b \[5\] instead of \[4\]"),
        ("blocks.7.attn.q.diff", draw(4, 6), r"1 unexpected \(diffusion_model.blocks.7.attn.q.diff\)"),
        ("blocks.0.modulation.diff_b", draw(6), r"1 unexpected \(.*modulation.diff_b\)"),
        ("blocks.0.norm.lora_down.weight", draw(1, 6), r"1 unexpected \(.*norm.lora_down.weight\)"),
    ],
)
def test_differences_that_do_not_fit_are_refused_by_name(tmp_path, name, array, message):
    save(tmp_path / "a.safetensors", TENSORS | {f"diffusion_model.{name}": array})
    with pytest.raises(UserError, match=f"{message}.*use a LoRA of this model"):
        load_lora(Path(tmp_path / "a.safetensors"), PARAMS, MODULES)
