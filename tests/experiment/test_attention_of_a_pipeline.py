"""The backend of attention is chosen when a model is loaded, whatever it was trained with."""

import dataclasses

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.distributed import Parallelism
from dit_video.nn.attention import SplashBlocks
from dit_video.sampling.pipeline_config import write_pipeline_config
from support.latents import generate_latents
from support.tiny_wan import SIZE, write_wan

OPTIONS = {"size": (5, 16, 16), "seed": 3}


@pytest.fixture
def trained_on_tpus(tiny_pipeline, tmp_path):
    """Return the folder of a pipeline whose config names a kernel that CPUs lack."""
    tiny_pipeline.save(tmp_path / "pipeline")
    model = tiny_pipeline.config.model.replace_backbone(attention="splash")
    write_pipeline_config(tmp_path / "pipeline", dataclasses.replace(tiny_pipeline.config, model=model))
    return tmp_path / "pipeline"


@pytest.mark.parametrize(
    "parallel", [None, pytest.param(Parallelism(), marks=pytest.mark.slow)], ids=["one device", "mesh"]
)
def test_a_kernel_that_the_devices_lack_is_refused_and_replaced(trained_on_tpus, tiny_pipeline, parallel):
    with pytest.raises(UserError, match=r"'splash' is invalid: its kernels are for tpu.*Use attention='auto'"):
        dit_video.load(trained_on_tpus, parallel=parallel)
    pipeline = dit_video.load(trained_on_tpus, attention="auto", parallel=parallel)
    latents = generate_latents(pipeline, "a red circle", **OPTIONS)
    np.testing.assert_allclose(latents, generate_latents(tiny_pipeline, "a red circle", **OPTIONS), atol=1e-5)


@pytest.mark.slow
def test_a_run_and_its_averages_are_loaded_with_any_backend(tiny_run, tiny_pipeline):
    assert dit_video.load(tiny_run, ema=0, attention="chunked").config.model.backbone.attention == "chunked"
    dense = dit_video.load(tiny_run, attention="dense")
    assert dense.config.model.backbone.attention == "dense"
    latents = [generate_latents(pipeline, "a red circle", **OPTIONS) for pipeline in (dense, tiny_pipeline)]
    np.testing.assert_allclose(*latents, atol=1e-4)
    with pytest.raises(UserError, match="'splash' is invalid"):
        dit_video.load(tiny_run, attention=SplashBlocks())


@pytest.mark.slow
def test_open_weights_are_loaded_with_any_backend(tmp_path):
    write_wan(tmp_path)
    pipelines = [dit_video.load(tmp_path, dtype="float32", attention=attention) for attention in ("dense", "chunked")]
    assert [each.config.model.backbone.attention for each in pipelines] == ["dense", "chunked"]
    latents = [generate_latents(each, "a cat", size=SIZE, steps=1) for each in pipelines]
    np.testing.assert_allclose(*latents, atol=1e-4)
    with pytest.raises(UserError, match="'splash' is invalid"):
        dit_video.load(tmp_path, attention=SplashBlocks())
