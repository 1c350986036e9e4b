"""Weights in host memory: same samples, and what is on the device at each stage of generation."""

import gc
from dataclasses import replace

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.core.offload import Layers, Stages, is_stacked_kernel
from dit_video.core.trees import flatten
from dit_video.models.encoders import embedder
from dit_video.sampling import sampler
from dit_video.weights.frozen_encoders import open_tokenizer
from support.latents import generate_latents
from support.marks import mark_slow_except
from support.tiny_wan import ANIMATING, DIT, SIZE, TWO, write_animating_wan, write_wan

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
PROMPTS = ("a red ball", "a blue ball", "two balls")


@pytest.fixture(scope="module", autouse=True)
def _freeze() -> None:
    """Exclude what other tests left from garbage collection, which comes before each count."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder like that of Wan 2.1 I2V, with a text encoder and an image encoder."""
    path = tmp_path_factory.mktemp("offload") / "wan"
    write_animating_wan(path, backbone=replace(ANIMATING, layers=2))
    return path


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Return a folder with two experts."""
    path = tmp_path_factory.mktemp("experts") / "wan"
    write_wan(path, backbone=replace(DIT, layers=2), **TWO)
    return path


def sample(pipeline, **options):
    return generate_latents(pipeline, PROMPTS[0], size=SIZE, steps=2, guidance=2.0, **options)


def count_device_bytes() -> int:
    """Return the bytes of all arrays in device memory."""
    gc.collect()
    return sum(each.nbytes for each in jax.live_arrays() if each.sharding.memory_kind == "device")


def count_param_bytes(params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def count_bytes_of_decoding(pipeline, latents) -> int:
    """Return the bytes in device memory after the first chunk of frames."""
    chunks = pipeline.codec.decode_chunks(latents[None])
    next(chunks)
    count = count_device_bytes()
    list(chunks)
    return count


@pytest.fixture
def program_calls(monkeypatch):
    """Record the device bytes, and the experts' weights, at each call of the sampler's program."""
    calls = []
    make_program = sampler.make_program

    def make(*arguments):
        program = make_program(*arguments)

        def run(params, *rest):
            calls.append((count_device_bytes(), params["backbone"]))
            return program(params, *rest)

        return run

    monkeypatch.setattr(sampler, "make_program", make)
    return calls


@pytest.fixture(scope="module")
def resident(folder):
    """Return the latents of a pipeline whose weights stay on the device, and the bytes there during decoding."""
    before = count_device_bytes()
    pipeline = dit_video.load(folder, dtype="float32", offload=None)
    latents = sample(pipeline, image=IMAGE)
    return latents, count_bytes_of_decoding(pipeline, latents) - before


@pytest.mark.nightly
@pytest.mark.parametrize("offload", mark_slow_except([Layers()], [Stages(), Layers(), Layers(denoiser=False)]))
def test_each_stage_has_only_its_own_weights_on_the_device(folder, offload, resident, program_calls):
    before = count_device_bytes()
    pipeline = dit_video.load(folder, dtype="float32", offload=offload)
    assert count_device_bytes() == before
    latents = sample(pipeline, image=IMAGE)
    np.testing.assert_allclose(latents, resident[0], atol=1e-5)
    after = count_device_bytes() - before
    assert after < 1024  # values that JAX keeps, such as the default key
    ((on_device, _),) = program_calls
    params = flatten(pipeline.denoiser_params["backbone"])
    is_streamed = offload == Layers()
    streamed = {path for path in params if is_streamed and is_stacked_kernel(path, params[path])}
    weights = count_param_bytes({path: leaf for path, leaf in params.items() if path not in streamed})
    largest_other = 64 * latents.nbytes  # noise, texts and conditioning of the two branches
    assert weights <= on_device - before <= weights + largest_other
    decoding = count_bytes_of_decoding(pipeline, latents) - before
    assert count_device_bytes() - before == after
    assert decoding <= resident[1] - count_param_bytes(pipeline.denoiser_params) + 1024
    assert decoding >= count_param_bytes(pipeline.codec.params)


@pytest.mark.parametrize("offload", mark_slow_except([Stages()], [Stages(), Layers(denoiser=False)]))
def test_the_text_encoder_is_alone_on_the_device_while_prompts_are_embedded(folder, offload, monkeypatch):
    counts, make_program = [], embedder.make_embedding_program

    def make(config):
        program = make_program(config)

        def run(params, *rest):
            counts.append((count_device_bytes(), params))
            return program(params, *rest)

        return run

    monkeypatch.setattr(embedder, "make_embedding_program", make)
    pipeline = dit_video.load(folder, dtype="float32", offload=offload)
    encoder = open_tokenizer(pipeline.config.model.text_encoder, offload=offload)
    before = count_device_bytes()
    encoder.encode_many(PROMPTS)
    assert counts
    for on_device, params in counts:
        leaves = flatten(params)
        streamed = {path for path, leaf in leaves.items() if leaf.sharding.memory_kind != "device"}
        expected = {path for path, leaf in leaves.items() if is_stacked_kernel(path, leaf)}
        assert streamed == (expected if offload == Layers(denoiser=False) else set())
        weights = count_param_bytes({path: leaf for path, leaf in leaves.items() if path not in streamed})
        assert weights <= on_device - before <= weights + 2**14
    assert count_device_bytes() - before < 1024


@pytest.mark.slow
def test_all_requests_pass_one_expert_after_the_other(experts, program_calls):
    requests = [dit_video.Request(prompt, SIZE) for prompt in PROMPTS]
    resident = dit_video.load(experts, dtype="float32", offload=None)
    sampling = resident.make_sampling(steps=4, guidance=1.0)
    expected = resident.generate_latents(requests, sampling=sampling)
    together = [id(jax.tree.leaves(params)[0]) for _, params in program_calls]
    program_calls.clear()
    before = count_device_bytes()
    pipeline = dit_video.load(experts, dtype="float32", offload=Stages())
    latents = pipeline.generate_latents(requests, sampling=sampling)
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    uploads = [id(jax.tree.leaves(params)[0]) for _, params in program_calls]
    assert len(uploads) == len(together) == 6
    assert uploads == [uploads[0]] * 3 + [uploads[-1]] * 3
    one_expert = count_param_bytes(pipeline.denoiser_params["backbone"])
    for on_device, _ in program_calls:
        assert on_device - before < 1.5 * one_expert


@pytest.mark.nightly
def test_a_saved_pipeline_can_be_offloaded(folder, resident, tmp_path):
    pipeline = dit_video.load(folder, dtype="float32", offload=Stages())
    pipeline.save(tmp_path / "own")
    again = dit_video.load(tmp_path / "own", offload=Layers())
    np.testing.assert_allclose(sample(again, image=IMAGE), resident[0], atol=1e-5)


def test_a_memory_of_decoding_stays_with_another_attention(folder):
    pipeline = dit_video.load(folder, dtype="float32").with_decoding(memory=2**30)
    assert pipeline.codec.memory == pipeline.model_parts.codec.memory == 2**30
    assert pipeline.with_attention("dense").codec.memory == 2**30


def test_too_little_memory_of_decoding_is_said_before_sampling(folder, program_calls):
    pipeline = dit_video.load(folder, dtype="float32").with_decoding(memory=1000)
    with pytest.raises(UserError, match=r"memory=1000 is invalid: to decode one latent frame .* Use at least these"):
        pipeline.generate(PROMPTS[0], size=SIZE, image=IMAGE, steps=1)
    with pytest.raises(UserError, match="memory=1000 is invalid"):
        pipeline.generate(PROMPTS[0], size=SIZE, image=IMAGE, steps=1)
    assert not program_calls


def test_a_placement_beside_offload_is_refused(folder):
    with pytest.raises(UserError, match="place is invalid beside parallel or offload"):
        dit_video.load(folder, offload=Stages(), place=lambda path, parameter: parameter.to_host())


@pytest.mark.nightly
def test_open_weights_are_bfloat16_unless_said_otherwise(folder):
    pipeline = dit_video.load(folder)
    dtypes = {path: str(leaf.dtype) for path, leaf in flatten(pipeline.denoiser_params["backbone"]).items()}
    assert dtypes["blocks/query/kernel"] == "bfloat16"
    assert dtypes["blocks/query/bias"] == "float32"
    assert pipeline.config.model.backbone.dtype == pipeline.config.model.text_encoder.dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(pipeline.codec.params)} == {"float32"}
    own = dit_video.load(folder, text_dtype="float32")
    assert (own.config.model.backbone.dtype, own.config.model.text_encoder.dtype) == ("bfloat16", "float32")
