"""A run whose captions are classes, from clips to samples by class."""

import csv
import shutil

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.experiment.run import Run
from dit_video.models.encoders import ClassNamesConfig
from dit_video.tokens import PackedShape
from support.latents import generate_latents

pytestmark = pytest.mark.slow
SIZE = (5, 16, 16)


@pytest.fixture(scope="module")
def names(tiny_clips):
    with (tiny_clips / "metadata.csv").open(newline="") as file:
        return tuple(sorted({row["text"] for row in csv.DictReader(file)}))


def experiment(tiny, names):
    """Return the tiny experiment with captions that name classes."""
    return tiny.EXPERIMENT.replace_model(
        backbone=tiny.EXPERIMENT.model.backbone.replace(context_width=0, classes=len(names)),
        text_encoder=ClassNamesConfig(classes=len(names), names=names),
        layout=PackedShape(tokens=12, text=3, segments=3),
    )


def begun(folder, experiment, tiny_run):
    """Return a run with the clips and the autoencoder of the tiny run."""
    run = Run.create(folder, experiment)
    run.take((tiny_run / "data").resolve())
    (folder / "autoencoder").mkdir()
    shutil.copy(tiny_run / "autoencoder" / "weights.safetensors", folder / "autoencoder")
    return run


def test_classes_are_learned_and_sampled_by_name(tiny, tiny_run, names, tmp_path):
    begun(tmp_path / "run", experiment(tiny, names), tiny_run).run_stages()
    pipeline = dit_video.load(tmp_path / "run")
    assert pipeline.denoiser_params["text"] == {}
    label = np.asarray(pipeline.denoiser_params["backbone"]["labels"])
    assert label.shape == (len(names) + 1, tiny.EXPERIMENT.model.backbone.width)

    def sample_latents(prompt):
        return generate_latents(pipeline, prompt, size=SIZE, steps=2, guidance=1.0)

    first = sample_latents(0)
    np.testing.assert_array_equal(sample_latents(names[0]), first)
    assert min(np.abs(sample_latents(other) - first).max() for other in (1, "")) > 1e-4


def test_captions_that_are_no_classes_are_refused(tiny, tiny_run, names, tmp_path):
    run = begun(tmp_path / "run", experiment(tiny, ("a dog", *names[1:])), tiny_run)
    with pytest.raises(UserError, match=f"{names[0]!r} is no class"):
        run.run_stages()
    backbone = tiny.EXPERIMENT.model.backbone.replace(context_width=0)
    with pytest.raises(UserError, match="captions are of 3 classes, the backbone of 0"):
        tiny.EXPERIMENT.replace_model(backbone=backbone, text_encoder=ClassNamesConfig(classes=3))
