"""Checks of requests by a pipeline's config, without weights: they refuse what the pipeline refuses."""

from dataclasses import replace

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.diffusion import Guidance
from dit_video.models.encoders import ClassNamesConfig
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Request
from dit_video.sampling.preparation import check_requests, check_sampling
from dit_video.sampling.request import Condition
from dit_video.video import Clip
from support.tiny_class_dit import DIT
from support.tiny_lora import CONFIG
from support.tiny_vace import write_vace
from support.tiny_wan import SIZE, write_animating_wan

IMAGE = np.zeros((16, 16, 3), np.uint8)
CLIP = Clip(np.zeros((*SIZE, 3), np.uint8), 16)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Return a pipeline of each kind."""
    folder = tmp_path_factory.mktemp("checks")
    writers = {"animating": write_animating_wan, "vace": write_vace}
    for name, write in writers.items():
        write(folder / name)
    return {name: dit_video.load(folder / name, dtype="float32") for name in writers}


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("vace", Request("a dog", (5, 16, 20))),
        ("vace", Request("a dog", SIZE, noise=np.zeros((2, 4, 4, 3), np.float32))),
        ("vace", Request("a dog", SIZE, conditions=[Condition(content=IMAGE, frame=9)])),
        ("vace", Request("a dog", SIZE, conditioning={"depth": 1})),
        ("animating", Request("a dog", SIZE)),
        ("vace", Request("a dog", (9, 16, 16), control=CLIP)),
        ("vace", Request("a dog", SIZE, video=CLIP, generated=np.ones((5, 8, 8), bool))),
        ("vace", Request("a dog", SIZE, strengths={"control": (1.0, 2.0, 3.0)})),
    ],
)
def test_what_a_pipeline_refuses_is_refused_without_its_weights(pipelines, kind, request_):
    pipeline = pipelines[kind]
    with pytest.raises(UserError) as error:
        pipeline.generate_many([request_])
    with pytest.raises(UserError) as same:
        check_requests(pipeline.config, [request_], pipeline.config.sampling)
    assert str(same.value) == str(error.value)


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("animating", Request("a dog", SIZE, image=IMAGE, noise=np.zeros((2, 4, 4, 4), np.float32))),
        ("vace", Request("a dog", SIZE, control=CLIP, reference_images=[IMAGE], strengths={"control": (1.0, 2.0)})),
    ],
)
def test_what_a_pipeline_samples_passes(pipelines, kind, request_):
    check_requests(pipelines[kind].config, [request_], Sampling(steps=2, guidance=Guidance(scales={"text": 1.0})))


@pytest.mark.parametrize(("kind", "names"), [("animating", "text, image"), ("vace", "text, control")])
def test_guidance_has_scales_of_the_conditions_of_a_model(pipelines, kind, names):
    config = pipelines[kind].config
    check_sampling(config, Sampling(guidance=Guidance(scales=dict.fromkeys(names.split(", "), 2.0))))
    with pytest.raises(UserError, match=f"guidance of motion is invalid: .* no such conditions, but {names}. Use"):
        check_sampling(config, Sampling(guidance=Guidance(scales={"text": 2.0, "motion": 1.0})))


def test_prompts_that_are_no_class_are_refused():
    backbone = replace(DIT, channels=4, patch=CONFIG.model.backbone.patch, variance="none", attention="dense")
    classes = ClassNamesConfig(classes=backbone.classes, names=("cat",))
    config = CONFIG.replace_model(backbone=backbone, text_encoder=classes)
    check_requests(config, [Request("cat", (1, 16, 16))], config.sampling)
    with pytest.raises(UserError, match="the caption 'dog' is no class"):
        check_requests(config, [Request("cat", (1, 16, 16)), Request("dog", (1, 16, 16))], config.sampling)
