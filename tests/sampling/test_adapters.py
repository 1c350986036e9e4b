"""Adapters of a pipeline: attached or merged, with other scales, and taken away."""

from dataclasses import replace

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.core.offload import Stages, is_in_host_memory
from dit_video.core.trees import flatten
from dit_video.families.denoisers import get_lora_modules
from dit_video.sampling.adapters import AdapterFile, check_adapter
from dit_video.weights import save
from support.compilations import count_compilations
from support.device_memory import count_bytes
from support.devices import check_on_eight_devices
from support.latents import generate_latents
from support.tiny_lora import CONFIG, make_pipeline, write_lora
from support.tiny_wan import SIZE, write_wan

WAN_PARTS = ("self_attn.q", "self_attn.o", "cross_attn.k", "cross_attn.o", "ffn.0", "ffn.2")
"""Linear maps of a block, by their names in ComfyUI."""


@pytest.fixture(scope="module")
def pipeline():
    """Return a pipeline whose weights no test merges into."""
    return make_pipeline()


@pytest.fixture(scope="module")
def file(pipeline, tmp_path_factory):
    return write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", pipeline)


@pytest.fixture(scope="module")
def plain(pipeline):
    return sample(pipeline)


def sample(pipeline, **options):
    return generate_latents(pipeline, "a red circle", steps=2, guidance=1.0, **options)


def get_bits(params):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(params).items()}


def count_device_bytes():
    return sum(count_bytes().values())


@pytest.mark.slow
def test_an_attached_adapter_equals_a_merged_one_and_copies_no_weights(pipeline, file, plain):
    before = count_device_bytes()
    attached = pipeline.load_lora(file, 0.5)
    assert count_device_bytes() < 1.2 * before
    latents = sample(attached)
    assert np.abs(latents - plain).max() > 1e-2
    merged = make_pipeline().load_lora(file, 0.5, merge=True)
    np.testing.assert_allclose(latents, sample(merged), atol=1e-5)
    for path, leaf in flatten(merged.denoiser_params).items():
        np.testing.assert_allclose(flatten(attached.denoiser_params)[path], leaf, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_products_with_bfloat16_weights_are_those_of_a_merged_adapter_up_to_rounding(file):
    own = make_pipeline(dtype="bfloat16")
    attached, plain = sample(own.load_lora(file, 0.5)), sample(own)
    change = np.abs(attached - plain).max()
    merged = sample(own.load_lora(file, 0.5, merge=True))
    assert np.abs(attached - merged).max() < 0.1 * change


def test_another_scale_compiles_nothing_and_scale_zero_gives_the_bits_back(pipeline, file, plain):
    attached = pipeline.load_lora(file, 0.5)
    sample(attached)
    count = count_compilations()
    weaker = sample(attached.set_lora_scales({"style": 0.25}))
    np.testing.assert_array_equal(sample(attached.set_lora_scales({"style": 0.0})), plain)
    assert count_compilations() == count
    np.testing.assert_allclose(weaker, sample(pipeline.load_lora(file, 0.25)), atol=1e-6)
    assert np.abs(weaker - sample(attached)).max() > 1e-3
    for unloaded in (attached.unload_lora(), attached.unload_lora("style"), attached.set_lora_scales({"style": 0})):
        np.testing.assert_array_equal(sample(unloaded), plain)
        assert get_bits(unloaded.denoiser_params) == get_bits(pipeline.denoiser_params)
    assert attached.lora_scales == {"style": 0.5}


@pytest.mark.slow
def test_several_adapters_have_scales_of_their_own(pipeline, file, tmp_path):
    other = write_lora(tmp_path / "style.safetensors", pipeline, seed=1)
    both = pipeline.load_lora(file, 0.5).load_lora(other, -0.25).load_lora(other, 0.125, name="third")
    assert both.lora_scales == {"style": 0.5, "style_2": -0.25, "third": 0.125}
    with pytest.raises(UserError, match=r"name='third' is invalid: an adapter of this name is attached"):
        both.load_lora(other, name="third")
    merged = make_pipeline().load_lora(file, 0.5, merge=True).load_lora(other, -0.125, merge=True)
    np.testing.assert_allclose(sample(both), sample(merged), atol=1e-5)
    one = both.unload_lora("style")
    assert one.lora_scales == {"style_2": -0.25, "third": 0.125}
    np.testing.assert_allclose(sample(one), sample(pipeline.load_lora(other, -0.25).load_lora(other, 0.125)), atol=1e-6)
    for use in (lambda: both.unload_lora("motion"), lambda: both.set_lora_scales({"motion": 1})):
        with pytest.raises(UserError, match=r"name='motion' of an adapter is invalid: .* Use style, style_2, third"):
            use()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_uses_the_memory_of_the_weights_and_unloading_gives_the_bits_back(tmp_path, dtype):
    first = make_pipeline(dtype=dtype)
    file = write_lora(tmp_path / "style.safetensors", first)
    dtypes = {path: leaf.dtype for path, leaf in flatten(first.denoiser_params).items()}
    bits, before = get_bits(first.denoiser_params), count_device_bytes()
    merged = first.load_lora(file, 0.5, merge=True).load_lora(file, 0.5, merge=True)
    assert count_device_bytes() < 1.2 * before
    assert get_bits(merged.denoiser_params) != bits
    assert {path: leaf.dtype for path, leaf in flatten(merged.denoiser_params).items()} == dtypes
    uses = (first.unload_lora, lambda: sample(first), lambda: first.denoiser_params, lambda: first.load_lora(file))
    for use in uses:
        with pytest.raises(UserError, match=r"are deleted: .* in place. Use the pipeline that load_lora"):
            use()
    restored = merged.load_lora(file, 0.5).unload_lora()
    assert count_device_bytes() < 1.2 * before
    assert get_bits(restored.denoiser_params) == bits
    assert restored.lora_scales == {}


def test_an_adapter_that_is_merged_has_no_name(file):
    first = make_pipeline()
    bits = get_bits(first.denoiser_params)
    with pytest.raises(UserError, match=r"name='x' is invalid: .* Leave it out; unload_lora\(\)"):
        first.load_lora(file, name="x", merge=True)
    assert get_bits(first.denoiser_params) == bits
    merged = first.load_lora(file, merge=True)
    with pytest.raises(UserError, match=r"name='style' .* Use unload_lora\(\) without a name, for adapters that are"):
        merged.unload_lora("style")
    with pytest.raises(UserError, match=r"name='x' .* Use style, or unload_lora\(\) without a name"):
        merged.load_lora(file).unload_lora("x")


@pytest.mark.slow
def test_a_lora_of_comfyui_changes_wan_attached_or_merged_and_is_taken_away_exactly(tmp_path):
    write_wan(tmp_path / "wan")
    own = dit_video.load(tmp_path / "wan", dtype="float32")
    shapes, draw = flatten(own.denoiser_params["backbone"]), np.random.default_rng(0)
    modules, tensors = get_lora_modules(own.config.model.backbone), {}
    for name in (f"blocks.{layer}.{part}" for layer in range(2) for part in WAN_PARTS):
        features_in, features_out = shapes[modules[name].path].shape[-2:]
        tensors[f"{name}.lora_down.weight"] = draw.normal(size=(2, features_in))
        tensors[f"{name}.lora_up.weight"] = draw.normal(size=(features_out, 2))
        tensors[f"{name}.alpha"] = np.asarray(1.0)
    width = own.config.model.backbone.width
    tensors |= {f"blocks.{layer}.diff_m": draw.normal(size=(1, 6, width)) for layer in range(2)}
    tensors["blocks.0.norm3.diff_b"] = draw.normal(size=width)
    file = tmp_path / "style.safetensors"
    save(file, {f"diffusion_model.{name}": (0.3 * array).astype(np.float32) for name, array in tensors.items()})
    check_adapter(file, own.config, get_lora_modules)
    bits, plain = get_bits(own.denoiser_params), sample(own, size=SIZE)
    attached = own.load_lora(file, 0.5)
    adapted = sample(attached, size=SIZE)
    assert np.abs(adapted - plain).max() > 1e-2
    for restored in (attached.set_lora_scales({"style": 0}), attached.unload_lora(), attached.unload_lora("style")):
        np.testing.assert_array_equal(sample(restored, size=SIZE), plain)
    merged = own.load_lora(file, 0.5, merge=True)
    np.testing.assert_allclose(sample(merged, size=SIZE), adapted, atol=1e-5)
    restored = merged.unload_lora()
    assert get_bits(restored.denoiser_params) == bits
    np.testing.assert_array_equal(sample(restored, size=SIZE), plain)


def test_an_adapter_that_does_not_fit_changes_nothing(pipeline, file, plain):
    narrow = make_pipeline(replace(CONFIG, model=CONFIG.model.replace_backbone(width=32, heads=2)))
    bits = get_bits(narrow.denoiser_params)
    with pytest.raises(UserError, match=r"misshapen \(backbone.blocks.0.* instead of .*use a LoRA of this model"):
        check_adapter(file, narrow.config, get_lora_modules)
    with pytest.raises(UserError, match=r"expert='low_noise' is invalid"):
        check_adapter(file, pipeline.config, get_lora_modules, expert="low_noise")
    for merge in (False, True):
        with pytest.raises(UserError, match=r"misshapen \(backbone.blocks.0.* instead of .*use a LoRA of this model"):
            narrow.load_lora(file, merge=merge)
        with pytest.raises(UserError, match=r"expert='low_noise' is invalid"):
            pipeline.load_lora(file, expert="low_noise", merge=merge)
    assert get_bits(narrow.denoiser_params) == bits


@pytest.mark.slow
def test_each_of_two_experts_has_its_adapters(tmp_path):
    two = make_pipeline(replace(CONFIG, boundary=0.6), offload=Stages())
    own, plain = get_bits(two.denoiser_params), sample(two)
    file = write_lora(tmp_path / "low.safetensors", two, expert="low_noise")
    attached = two.load_lora(file, 0.5, expert="low_noise")
    merged = two.load_lora(file, 0.5, expert="low_noise", merge=True)
    assert np.abs(sample(attached) - plain).max() > 1e-3
    np.testing.assert_allclose(sample(attached), sample(merged), atol=1e-5)
    changed = {path for path, bits in get_bits(merged.denoiser_params).items() if bits != own[path]}
    assert changed
    assert all(path.startswith("low_noise/blocks/") for path in changed)
    for restored in (attached.unload_lora(), merged.unload_lora(), two):
        assert get_bits(restored.denoiser_params) == own


@pytest.mark.nightly
def test_weights_in_host_memory_are_adapted_there(pipeline, file, plain):
    own = make_pipeline(offload=Stages())
    bits, expected = get_bits(own.denoiser_params), sample(pipeline.load_lora(file, 0.5))
    attached, merged = own.load_lora(file, 0.5), own.load_lora(file, 0.5, merge=True)
    for adapted in (attached, merged):
        np.testing.assert_allclose(sample(adapted), expected, atol=1e-5)
        leaves = flatten(adapted.denoiser_params)
        assert all(is_in_host_memory(leaf) for leaf in leaves.values())
        assert get_bits(adapted.unload_lora().denoiser_params) == bits
    np.testing.assert_array_equal(sample(own), plain)


def test_a_saved_pipeline_has_its_attached_adapters_in_its_weights(pipeline, file, tmp_path):
    attached = pipeline.load_lora(file, 0.5)
    attached.save(tmp_path / "saved")
    saved = dit_video.load(tmp_path / "saved")
    assert get_bits(saved.denoiser_params) == get_bits(attached.denoiser_params)
    assert pipeline.with_attention("dense").load_lora(file).with_attention("chunked").lora_scales == {"style": 1.0}


@pytest.mark.slow
def test_eight_devices_share_an_adapter_and_merge_it_in_place():
    check_on_eight_devices("lora_on_eight_devices.py")


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        (
            "@1@low",
            UserError,
            r"style.safetensors@1@low is invalid: .*@low_noise. Use .*style.safetensors@0.8 or .*@low_n",
        ),
        ("@strong", UserError, r"@strong is invalid: the file may be followed by @SCALE"),
        (".bak@1", MissingError, r"no such file: .*style.safetensors.bak of --lora .* FILE@SCALE@EXPERT"),
    ],
)
def test_options_of_adapters_name_the_scale_and_the_expert_after_the_file(tmp_path, end, error, message):
    file = tmp_path / "style.safetensors"
    file.touch()
    assert AdapterFile.parse(f"{file}@.5@low_noise") == (file, 0.5, "low_noise")
    with pytest.raises(error, match=message):
        AdapterFile.parse(f"{file}{end}")
