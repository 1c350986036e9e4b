"""A run with a U-Net on canvases: the same experiment as with a transformer on packed rows, but for two fields."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import dit_video
from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.experiment.run import Run
from dit_video.models.autoencoders import PatchVaeConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.unet import UnetConfig
from dit_video.sampling.pipeline import Request
from dit_video.tokens import CanvasShape, Grid, PackedShape

UNET = UnetConfig(channels=4, context_width=16, width=8, multipliers=(1, 2), heads=2, groups=4)
CANVAS = CanvasShape(size=Grid(3, 16, 16), text=96, segments=6, cell=UNET.size_multiple, padding=UNET.canvas_padding)


@pytest.fixture
def unet_experiment(tiny):
    autoencoder = PatchVaeConfig(stride=Grid(4, 4, 4), channels=4, width=8, blocks=1)
    experiment = tiny.EXPERIMENT.replace_model(autoencoder=autoencoder, backbone=UNET, layout=CANVAS)
    return experiment.replace_stage("autoencoder", steps=3).replace_stage("denoiser", steps=3)


@pytest.mark.slow
def test_a_unet_is_trained_on_canvases_and_sampled_at_any_size(unet_experiment, tiny_clips, tmp_path):
    run = Run.create(tmp_path / "run", unet_experiment)
    run.train(tiny_clips)
    pipeline = run.load_pipeline()
    assert pipeline.config.model.layout == CANVAS
    requests = [Request("a red circle", Grid(*size), seed=seed) for seed, size in enumerate([(9, 16, 32), (1, 16, 16)])]
    requests.append(Request("a blue square", Grid(5, 64, 72), seed=2))  # larger than the canvas
    together = pipeline.generate_many(requests)
    assert [clip.frames.shape[:3] for clip in together] == [tuple(request.size) for request in requests]
    loaded = dit_video.load(tmp_path / "run")
    for request, expected in zip(requests, together, strict=True):
        alone = loaded.generate(request.prompt, size=request.size, seed=request.seed)
        assert np.abs(alone.frames.astype(int) - expected.frames).max() <= 1


def test_the_config_of_a_unet_differs_from_a_transformer_s_in_backbone_and_layout(monkeypatch):
    folder = Path(__file__).parents[2] / "experiments"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("unet_config", folder / "configs" / "unet.py")
    assert spec is not None
    assert spec.loader is not None
    config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config)
    experiments = config.make_experiment(), config.make_transformer_experiment()
    unet, transformer = (config_json.to_json(each) for each in experiments)
    different = {name for name in unet["model"] if unet["model"][name] != transformer["model"][name]}
    assert different == {"backbone", "layout"}
    assert {**unet, "model": None} == {**transformer, "model": None}
    for name in [name for name in sys.modules if name == "configs" or name.startswith("configs.")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_layout_that_the_backbone_does_not_accept_is_refused(unet_experiment):
    dit = DiTConfig(channels=4, context_width=16, patch=Grid(1, 2, 2), width=24, layers=1, heads=2)
    for changes, message in (
        ({"layout": PackedShape(tokens=96, text=96, segments=6)}, r"UnetConfig takes canvases. Use CanvasShape"),
        ({"backbone": dit}, r"DiTConfig takes rows. Use PackedShape"),
        (
            {"layout": dataclasses.replace(CANVAS, cell=Grid(1, 1, 1))},
            r"layout.cell=\(1, 1, 1\) is invalid: .* Use \(1, 2, 2\)",
        ),
        (
            {"layout": dataclasses.replace(CANVAS, padding=Grid(1, 0, 2))},
            r"layout.padding=\(1, 0, 2\) is invalid: .* Use \(1, 2, 2\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            unet_experiment.replace_model(**changes)
