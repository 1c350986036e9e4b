"""Files of adapters. The model has a kernel and a stack of three, each of which stands for two maps of the file."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten, unflatten
from dit_video.nn import merge_lora
from dit_video.weights import (
    LoraModule,
    expand_layers,
    get_native_modules,
    load,
    load_lora,
    load_metadata,
    save,
    save_lora,
)
from dit_video.weights.lora import check_lora

NOISE = np.random.default_rng(0)
PARAMS = {
    "embed": {"kernel": NOISE.normal(size=(4, 6)).astype(np.float32), "bias": np.zeros(6, np.float32)},
    "blocks": {"qk": {"kernel": NOISE.normal(size=(3, 6, 10)).astype(np.float32)}},
}
MODULES = {"patch_embedding": LoraModule("embed/kernel")} | {
    f"blocks.{layer}.attn.{name}": LoraModule("blocks/qk/kernel", layer, columns)
    for layer in range(3)
    for name, columns in (("to_q", (0, 4)), ("to_k", (4, 10)))
}


def theirs(rank=2, modules=MODULES, ranks=()):
    """Return factors as torch has them, `[r, i]` and `[o, r]`, by module."""
    noise, result = np.random.default_rng(rank), {}
    for number, (name, module) in enumerate(modules.items()):
        features_in, features_out = flatten(PARAMS)[module.path].shape[-2:]
        features_out = features_out if module.columns is None else module.columns[1] - module.columns[0]
        own = dict(ranks).get(number, rank)
        shapes = (own, features_in), (features_out, own)
        result[name] = tuple(noise.normal(size=shape).astype(np.float32) for shape in shapes)
    return result


def write_file(path, factors, *, name="transformer.{}.lora_{}.weight", ab="AB", flat=False, **save_args):
    """Write factors under a scheme of names and return the path."""
    tensors = {}
    for module, pair in factors.items():
        for part, array in zip(ab, pair, strict=True):
            tensors[name.format(module.replace(".", "_") if flat else module, part)] = array
    save(path, tensors, **save_args)
    return path


def changed(drop=(), add=None):
    """Return the tensors of a file without some of them, and with others."""
    tensors = {}
    for name, (a, b) in theirs().items():
        tensors |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    return {name: array for name, array in tensors.items() if name not in drop} | (add or {})


def merge_by_hand(factors, scale):
    """Return the kernels after the change of every module; `scale` takes its name and rank."""
    leaves = {path: leaf.copy() for path, leaf in flatten(PARAMS).items()}
    for name, (a, b) in factors.items():
        module = MODULES[name]
        kernel = leaves[module.path] if module.layer is None else leaves[module.path][module.layer]
        kernel[:, slice(*(module.columns or (None,)))] += scale(name, a.shape[0]) * (b @ a).T
    return unflatten(leaves)


def assert_merged(lora, expected):
    for path, leaf in flatten(merge_lora(PARAMS, lora)).items():
        np.testing.assert_allclose(leaf, flatten(expected)[path], atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    "scheme",
    [
        {"name": "transformer.{}.lora_{}.weight"},
        {"name": "{}.lora_{}.weight"},
        {"name": "base_model.model.{}.lora_{}.weight"},
        {"name": "base_model.model.transformer.{}.lora_{}.default.weight"},
        {"name": "base_model.model.{}.lora_{}.my_style.weight"},
        {"name": "diffusion_model.{}.lora_{}.weight"},
        {"name": "diffusion_model.{}.lora_{}.weight", "ab": ("down", "up")},
        {"name": "lora_unet_{}.lora_{}.weight", "ab": ("down", "up"), "flat": True},
        {"name": "lycoris_{}.lora_{}.weight", "ab": ("down", "up"), "flat": True},
    ],
    ids=lambda scheme: scheme["name"],
)
def test_every_scheme_of_names_is_understood(tmp_path, scheme):
    factors = theirs()
    lora = load_lora(write_file(tmp_path / "a.safetensors", factors, **scheme), PARAMS, MODULES)
    assert_merged(lora, merge_by_hand(factors, lambda name, rank: 1.0))  # without any alpha the scale is 1


def test_every_module_may_have_its_own_rank_and_alpha(tmp_path):
    factors = theirs(ranks={1: 3, 4: 5})
    alphas = {name: np.float32(number + 0.5) for number, name in enumerate(factors)}
    tensors = {f"diffusion_model.{name}.alpha": alpha for name, alpha in alphas.items()}
    for name, (a, b) in factors.items():
        tensors |= {f"diffusion_model.{name}.lora_down.weight": a, f"diffusion_model.{name}.lora_up.weight": b}
    save(tmp_path / "a.safetensors", {name: np.asarray(tensor) for name, tensor in tensors.items()})
    lora = load_lora(tmp_path / "a.safetensors", PARAMS, MODULES)
    assert_merged(lora, merge_by_hand(factors, lambda name, rank: alphas[name] / rank))


@pytest.mark.parametrize("alpha", [None, 6])
@pytest.mark.parametrize("name", ["lora_B.bias", "lora_B.default.bias", "lora_B.my_style.bias", "lora_up.bias"])
def test_a_bias_of_the_second_factor_is_scaled_as_it_is(tmp_path, name, alpha):
    """PEFT's `lora_bias`: the change is that of `scale * (B (A x) + bias)`."""
    ab = ("down", "up") if "up" in name else "AB"
    factors, bias = {"patch_embedding": theirs()["patch_embedding"]}, np.arange(6, dtype=np.float32)
    write_file(tmp_path / "a.safetensors", factors, ab=ab)
    tensors = load(tmp_path / "a.safetensors") | {f"transformer.patch_embedding.{name}": bias}
    tensors |= {} if alpha is None else {"transformer.patch_embedding.alpha": np.float32(alpha)}
    save(tmp_path / "b.safetensors", {name: np.asarray(tensor) for name, tensor in tensors.items()})
    scale = 1.0 if alpha is None else alpha / 2
    expected = merge_by_hand(factors, lambda name, rank: scale)
    expected["embed"]["bias"] = PARAMS["embed"]["bias"] + scale * bias
    lora = load_lora(tmp_path / "b.safetensors", PARAMS, MODULES)
    assert_merged(lora, expected)
    save_lora(tmp_path / "c.safetensors", lora, MODULES)
    np.testing.assert_allclose(load(tmp_path / "c.safetensors")["transformer.patch_embedding.lora_B.bias"], bias)
    assert json.loads(load_metadata(tmp_path / "c.safetensors")["lora_adapter_metadata"])["transformer.lora_bias"]
    assert_merged(load_lora(tmp_path / "c.safetensors", PARAMS, MODULES), expected)


def test_two_adapters_in_one_file_are_refused(tmp_path):
    for name in ("first", "second"):
        write_file(tmp_path / f"{name}.safetensors", theirs(), name=f"{{}}.lora_{{}}.{name}.weight")
    both = load(tmp_path / "first.safetensors") | load(tmp_path / "second.safetensors")
    save(tmp_path / "a.safetensors", both)
    with pytest.raises(UserError, match=r"14 unexpected \(blocks.0.attn.to_k.lora_A.second.weight"):
        load_lora(tmp_path / "a.safetensors", PARAMS, MODULES)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_blocks_0_attn_to_q.dora_scale", "DoRA"),
        ("transformer.blocks.0.attn.to_q.lora_magnitude_vector", "DoRA"),
        ("transformer.blocks.0.attn.to_q.lora_magnitude_vector.default.weight", "DoRA"),
        ("lycoris_blocks_0_attn_to_q.lokr_w1", "LoKr"),
        ("lycoris_blocks_0_attn_to_q.lokr_w2_a", "LoKr"),
        ("lycoris_blocks_0_attn_to_q.hada_w1_a", "LoHa"),
        ("lora_unet_blocks_0_attn_to_q.lora_mid.weight", "LoCon"),
        ("base_model.model.blocks.0.attn.to_q.vera_lambda_b", "VeRA"),
        ("base_model.vera_A", "VeRA"),
        ("base_model.model.blocks.0.attn.to_q.lora_E", "AdaLoRA"),
        ("base_model.model.blocks.0.attn.to_q.boft_R", "BOFT"),
        ("transformer.blocks.0.attn.to_q.oft_R.default.weight", "OFT"),
        ("lora_unet_blocks_0_attn_to_q.oft_blocks", "OFT"),
        ("transformer.blocks.0.attn.to_q.ia3_l.default", "IA3"),
        ("lycoris_blocks_0_attn_to_q.a1.weight", "GLoRA"),
    ],
)
def test_other_kinds_of_adapters_are_named(tmp_path, name, kind):
    """Whether the rest of the file is a LoRA of this model or not."""
    for others in ({}, changed()):
        save(tmp_path / "a.safetensors", others | {name: np.ones(4, np.float32)})
        for read in (load_lora, check_lora):
            with pytest.raises(UserError, match=rf"is a {kind}.* adapter, as it has {re.escape(name)}.*Use a LoRA"):
                read(tmp_path / "a.safetensors", PARAMS, MODULES)


def test_the_file_in_a_folder_is_found(tmp_path):
    factors = theirs()
    with pytest.raises(MissingError, match="has no safetensors file, and an adapter is one"):
        load_lora(tmp_path, PARAMS, MODULES)
    write_file(tmp_path / "style.safetensors", factors)
    assert_merged(load_lora(tmp_path, PARAMS, MODULES), merge_by_hand(factors, lambda name, rank: 1.0))
    write_file(tmp_path / "other.safetensors", factors)
    with pytest.raises(MissingError, match="has 2 safetensors files, and an adapter is one"):
        load_lora(tmp_path, PARAMS, MODULES)


def test_modules_missing_from_the_file_are_not_changed(tmp_path):
    factors = {name: pair for name, pair in theirs().items() if name == "blocks.1.attn.to_k"}
    lora = load_lora(write_file(tmp_path / "a.safetensors", factors), PARAMS, MODULES)
    assert set(flatten(lora)) == {f"blocks/qk/kernel/{leaf}" for leaf in ("a", "b", "scale")}
    assert_merged(lora, merge_by_hand(factors, lambda name, rank: 1.0))
    save_lora(tmp_path / "b.safetensors", lora, MODULES)
    assert load(tmp_path / "b.safetensors").keys() == load(tmp_path / "a.safetensors").keys()


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_saved_adapters_come_back_bit_for_bit(tmp_path, style, dtype):
    factors = {name: tuple(x.astype(dtype) for x in pair) for name, pair in theirs(3, ranks={0: 5}).items()}
    leaves = load_lora(write_file(tmp_path / "a.safetensors", factors), PARAMS, MODULES, dtype=None)
    leaves = flatten(leaves)
    for path, alpha in (("embed", 7 / 5), ("blocks/qk", 4 / 3)):
        leaves[f"{path}/kernel/scale"] = leaves[f"{path}/kernel/scale"] * alpha
    leaves = unflatten(leaves)
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_lora(first, leaves, MODULES, style=style)
    result = load_lora(first, PARAMS, MODULES, dtype=None)
    assert flatten(result).keys() == flatten(leaves).keys()
    for path, leaf in flatten(leaves).items():
        np.testing.assert_array_equal(flatten(result)[path], leaf, err_msg=path)
        assert flatten(result)[path].dtype == leaf.dtype
    save_lora(second, result, MODULES, style=style)
    assert first.read_bytes() == second.read_bytes()
    tensors = load(first, dtype=None)
    downwards = {"diffusers": "transformer.{}.lora_A.weight", "comfyui": "diffusion_model.{}.lora_down.weight"}
    for name, (a, _) in factors.items():
        full = downwards.get(style, "lora_unet_{}.lora_down.weight").format(
            name.replace(".", "_") if style == "kohya" else name
        )
        np.testing.assert_array_equal(tensors[full], a)
        assert tensors[full].dtype == np.dtype(dtype)
    if style == "diffusers":
        assert not [name for name in tensors if "alpha" in name]
        header = json.loads(load_metadata(first)["lora_adapter_metadata"])
        assert (header["transformer.r"], header["transformer.lora_alpha"]) == (3, 4)
        assert header["transformer.rank_pattern"] == {"patch_embedding": 5}
        assert header["transformer.alpha_pattern"] == {"patch_embedding": 7}


def test_native_names_follow_the_parameter_paths(tmp_path):
    modules = get_native_modules(PARAMS)
    expected = {f"blocks.{layer}.qk": LoraModule("blocks/qk/kernel", layer) for layer in range(3)}
    assert modules == {"embed": LoraModule("embed/kernel")} | expected
    assert expand_layers({"blocks/qk/kernel": "b.{}", "embed/kernel": "e"}, PARAMS) == {
        "e": LoraModule("embed/kernel"),
        **{f"b.{layer}": LoraModule("blocks/qk/kernel", layer) for layer in range(3)},
    }
    factors = theirs(modules=modules)
    lora = load_lora(write_file(tmp_path / "a.safetensors", factors), PARAMS, modules)
    assert lora["blocks"]["qk"]["kernel"]["a"].shape == (3, 6, 2)
    np.testing.assert_array_equal(lora["blocks"]["qk"]["kernel"]["b"][2], factors["blocks.2.qk"][1].T)


def test_a_peft_folder_is_read_with_its_alpha_settings(tmp_path):
    factors = theirs()
    write_file(tmp_path / "adapter_model.safetensors", factors, name="base_model.model.{}.lora_{}.weight")
    config = {"r": 2, "lora_alpha": 6, "alpha_pattern": {"attn.to_k": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    result = load_lora(tmp_path, PARAMS, MODULES)
    assert_merged(result, merge_by_hand(factors, lambda name, rank: (1 if name.endswith("to_k") else 6) / rank))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "use_rslora": True}))
    assert_merged(load_lora(tmp_path, PARAMS, MODULES), merge_by_hand(factors, lambda name, rank: 6 / rank**0.5))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "use_dora": True}))
    with pytest.raises(UserError, match="is a DoRA adapter"):
        load_lora(tmp_path, PARAMS, MODULES)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "peft_type": "VERA"}))
    save(tmp_path / "adapter_model.safetensors", {"base_model.x": np.ones(4, np.float32)})
    for read in (load_lora, check_lora):
        with pytest.raises(UserError, match=r"is a VERA adapter, as it has peft_type=VERA, .* Use a LoRA"):
            read(tmp_path, PARAMS, MODULES)


EMBED = "transformer.patch_embedding.lora_"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (changed(drop=[f"{EMBED}B.weight"]), [f"1 missing ({EMBED}B.weight)"]),
        (changed(drop=[f"{EMBED}A.weight"]), [f"1 missing ({EMBED}A.weight)"]),
        (
            changed(add={"transformer.head.lora_A.weight": np.zeros((2, 4)), f"{EMBED}A.bias": np.zeros(6)}),
            [f"2 unexpected (transformer.head.lora_A.weight, {EMBED}A.bias)"],
        ),
        (
            changed(add={f"{EMBED}A.weight": np.zeros((2, 5))}),
            [f"misshapen ({EMBED}A.weight [2, 5] instead of [2, 4])"],
        ),
        (
            changed(add={f"{EMBED}B.weight": np.zeros((6, 3))}),
            [f"misshapen ({EMBED}B.weight [6, 3] instead of [6, 2])"],
        ),
        (
            changed(add={"diffusion_model.patch_embedding.lora_A.weight": np.zeros((2, 4))}),
            ["diffusion_model.patch_embedding.lora_"],
        ),
        (
            {f"x.{n}.lora_A.weight": np.zeros((2, 4)) for n in range(12)},
            ["is not a LoRA of this model", "x.0.lora_A.weight"],
        ),
        ({"patch_embedding.alpha": np.ones(())}, ["patch_embedding.alpha without the factors"]),
        ({f"{EMBED}B.bias": np.ones(6)}, [f"{EMBED}B.bias without the factors"]),
        (
            changed(add={"transformer.blocks.0.attn.to_q.lora_B.bias": np.zeros(4)}),
            ["1 unexpected (transformer.blocks.0.attn.to_q.lora_B.bias)"],  # the model has no such bias
        ),
        ({}, ["has no tensors"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, tensors, words):
    save(tmp_path / "a.safetensors", {name: np.asarray(array, np.float32) for name, array in tensors.items()})
    with pytest.raises(UserError) as caught:
        load_lora(tmp_path / "a.safetensors", PARAMS, MODULES)
    for word in words:
        assert word in str(caught.value)


def test_the_first_ten_of_many_are_named(tmp_path):
    tensors = changed(add={f"transformer.other.{n:02d}.lora_A.weight": np.zeros((2, 4), np.float32) for n in range(12)})
    save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=r"12 unexpected .*other.09.lora_A.weight, … 2 more"):
        load_lora(tmp_path / "a.safetensors", PARAMS, MODULES)


def test_missing_files_and_unnamed_modules_are_refused(tmp_path):
    with pytest.raises(MissingError, match="no such file"):
        load_lora(tmp_path / "a.safetensors", PARAMS, MODULES)
    lora = load_lora(write_file(tmp_path / "a.safetensors", theirs()), PARAMS, MODULES)
    with pytest.raises(UserError, match=r"no names for adapters of blocks/qk/kernel. Use layout"):
        save_lora(tmp_path / "b.safetensors", lora, {"patch_embedding": LoraModule("embed/kernel")})
    assert not (tmp_path / "b.safetensors").exists()


# --- against PEFT and diffusers -------------------------------------------------------------------------------------


@pytest.mark.parity
def test_a_peft_adapter_gives_equal_outputs(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(
        {
            "patch_embedding": torch.nn.Linear(4, 6),
            "blocks": torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(6, 6)}) for _ in range(3)),
        }
    )

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embedding, self.blocks = net["patch_embedding"], net["blocks"]

        def forward(self, x):
            x = self.patch_embedding(x)
            for block in self.blocks:
                x = torch.tanh(block["up"](x))
            return x

    stack = Stack()
    kernels = [
        layer.weight.detach().numpy().T.copy() for layer in (stack.patch_embedding, *(b["up"] for b in net["blocks"]))
    ]
    biases = [layer.bias.detach().numpy() for layer in (stack.patch_embedding, *(b["up"] for b in net["blocks"]))]
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["up", "patch_embedding"], rank_pattern={"blocks.1.up": 4},
        alpha_pattern={"patch_embedding": 5}, init_lora_weights=False,
    )  # fmt: skip
    adapted = peft.get_peft_model(stack, config)
    adapted.save_pretrained(tmp_path)

    params = {"embed": {"kernel": kernels[0]}, "blocks": {"up": {"kernel": np.stack(kernels[1:])}}}
    modules = expand_layers({"embed/kernel": "patch_embedding", "blocks/up/kernel": "blocks.{}.up"}, params)
    merged = merge_lora(params, load_lora(tmp_path, params, modules))
    x = NOISE.normal(size=(5, 4)).astype(np.float32)
    y = x @ merged["embed"]["kernel"] + biases[0]
    for kernel, bias in zip(merged["blocks"]["up"]["kernel"], biases[1:], strict=True):
        y = np.tanh(y @ kernel + bias)
    with torch.no_grad():
        np.testing.assert_allclose(y, adapted(torch.from_numpy(x)).numpy(), atol=2e-6)
        assert np.abs(y - adapted.get_base_model()(torch.from_numpy(x)).numpy()).max() < 2e-6
        with adapted.disable_adapter():
            assert np.abs(y - adapted(torch.from_numpy(x)).numpy()).max() > 1e-2


LAYERS = 2
ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
NAMES = {f"attn1.{theirs}": f"self_attn.{wans}" for theirs, wans in ATTENTION.items()}
NAMES |= {f"attn2.{theirs}": f"cross_attn.{wans}" for theirs, wans in ATTENTION.items()}
NAMES |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
"""diffusers' names of the maps in a block of Wan, and Wan's own"""
WIDTHS = {"ffn.net.0.proj": (12, 16), "ffn.net.2": (16, 12)}
WAN = {
    "blocks": {
        name.replace(".", "_"): {"kernel": np.zeros((LAYERS, *WIDTHS.get(name, (12, 12))), np.float32)}
        for name in NAMES
    }
}


def wan_modules(style):
    names = {theirs: theirs if style == "diffusers" else wans for theirs, wans in NAMES.items()}
    paths = {f"blocks/{theirs.replace('.', '_')}/kernel": f"blocks.{{}}.{name}" for theirs, name in names.items()}
    return expand_layers(paths, WAN)


@pytest.mark.parity
@pytest.mark.parametrize("style", ["diffusers", "comfyui", "kohya"])
def test_diffusers_reads_what_is_written_here(tmp_path, style):
    diffusers, _ = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=LAYERS,
    )  # fmt: skip
    noise, lora = np.random.default_rng(1), {}
    for name, leaf in WAN["blocks"].items():
        layers, features_in, features_out = leaf["kernel"].shape
        rank, scale = (3, 0.5) if name.startswith("ffn") else (2, 2.0)
        factors = {
            "a": noise.normal(size=(layers, features_in, rank)).astype(np.float32),
            "b": noise.normal(size=(layers, rank, features_out)).astype(np.float32),
        }
        lora[name] = {"kernel": factors | {"scale": np.full(layers, scale)}}
    lora = {"blocks": lora}
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", lora, wan_modules(style), style=style)
    for path, leaf in flatten(load_lora(tmp_path, WAN, wan_modules(style))).items():
        np.testing.assert_array_equal(leaf, flatten(lora)[path], err_msg=path)

    before = {name: tensor.clone().numpy() for name, tensor in transformer.state_dict().items()}
    state, metadata = diffusers.WanPipeline.lora_state_dict(str(tmp_path), return_lora_metadata=True)
    diffusers.WanPipeline.load_lora_into_transformer(state, transformer, metadata=metadata)
    transformer.fuse_lora()
    transformer.unload_lora()
    after, expected = transformer.state_dict(), flatten(merge_lora(WAN, lora))
    for name, place in wan_modules("diffusers").items():
        change = after[f"{name}.weight"].numpy() - before[f"{name}.weight"]
        np.testing.assert_allclose(change.T, expected[place.path][place.layer], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("transformer.blocks.0.attn.to_x.lora_A.weight", r"blocks\.0\.attn\.to_q"),
        ("diffusion_model.blocks.0.self_attn.x.lora_down.weight", r"blocks\.0\.self_attn\.q"),
        ("lora_unet_blocks_0_self_attn_x.lora_down.weight", r"blocks\.0\.self_attn\.q"),
    ],
)
def test_names_in_the_style_of_the_file_are_examples_of_a_models_modules(tmp_path, name, example):
    save(tmp_path / "a.safetensors", {name: np.zeros((2, 4), np.float32)})
    native = {"backbone.embed": LoraModule("embed/kernel")}
    authors = {name.replace("attn.to_", "self_attn."): module for name, module in MODULES.items()}
    others = {"blocks.0.self_attn.x_img": LoraModule(None), "blocks.0.attn.to_x_img": LoraModule(None)}
    for modules, each in ((native | MODULES | authors | others, example), (native, r"backbone\.embed")):
        with pytest.raises(UserError, match=f"one of the model's modules, such as {each}"):
            load_lora(tmp_path / "a.safetensors", PARAMS, modules)
