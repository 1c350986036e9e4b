"""Fine-tuning of runs and pipelines of our own: adapters, all weights, and models that grow."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten
from dit_video.diffusion import Uniform
from dit_video.distributed import make_mesh
from dit_video.experiment import AllWeights, TemporalWeights
from dit_video.experiment.denoiser import get_optimizer_config, open_trainable_denoiser
from dit_video.experiment.export import ADAPTER_FILE
from dit_video.experiment.recipes.finetune import FineTuningOptions, make_finetuning_experiment
from dit_video.experiment.run import Run
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig, TemporalLayers
from dit_video.nn import LoraConfig
from dit_video.training.losses.denoiser import TEMPORAL_PATHS
from support.extending import shorten
from support.interruptions import end_after

STEPS = 4
LORA = LoraConfig(rank=2, targets=(r"^backbone/blocks/.*kernel$",))


def make_experiment(folder, **options):
    common = {"steps": STEPS, "warmup": 1, "samples": 1, "sampling_steps": 2, "learning_rate": 1e-2, "lora": LORA}
    return make_finetuning_experiment(folder, FineTuningOptions(**common | options))


def train(experiment, tiny_run, folder):
    run = Run.create(folder, experiment)
    run.train((tiny_run / "data").resolve())
    return run


def get_leaves(folder):
    return flatten(dit_video.load(folder).denoiser_params)


@pytest.fixture(scope="module")
def images(tiny, tiny_run, tmp_path_factory):
    """Return the run of an image model on single frames, to be read only."""
    experiment = shorten(tiny.EXPERIMENT, tiny_run)
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, max_frames=1))
    return train(experiment, tiny_run, tmp_path_factory.mktemp("images") / "run").folder


@pytest.mark.parametrize("place", ["", pytest.param("pipeline", marks=pytest.mark.nightly)])
def test_adapters_on_a_run_are_merged_and_exported(tiny_run, tmp_path, place):
    """The folder of a run or of its pipeline is one argument, as that of open weights is."""
    experiment = make_experiment(tiny_run / place)
    start = Run.open(tiny_run).experiment
    assert experiment.model == start.model
    assert (experiment.data.max_pixels, experiment.data.max_frames) == (start.data.max_pixels, start.data.max_frames)
    assert experiment.sampling.solver == start.sampling.solver
    run = train(experiment, tiny_run, tmp_path / "run")
    before, trained = get_leaves(tiny_run), get_leaves(run.folder)
    loaded = flatten(dit_video.load(tiny_run).load_lora(run.folder / ADAPTER_FILE).denoiser_params)
    for path, leaf in trained.items():
        np.testing.assert_allclose(loaded[path], leaf, atol=1e-5, err_msg=path)
        adapted = re.search(LORA.targets[0], path) is not None
        assert (np.abs(leaf - before[path]).max() > 1e-5) == adapted, path


@pytest.mark.nightly
def test_all_weights_of_a_run_are_trained_and_continued(tiny_run, tmp_path, monkeypatch):
    experiment = dataclasses.replace(make_experiment(tiny_run, train="full"), save_every=2)
    whole = train(experiment, tiny_run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        end_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(experiment, tiny_run, tmp_path / "parts")
    Run.open(tmp_path / "parts").run_stages()
    before, after, parts = (get_leaves(folder) for folder in (tiny_run, whole.folder, tmp_path / "parts"))
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, parts[path], err_msg=path)
        assert np.abs(leaf - before[path]).max() > 0, path


@pytest.mark.parametrize("options", [{}, {"max_frames": 17}, {"max_frames": 6}, {"train": "temporal", "max_frames": 1}])
def test_the_pipeline_of_a_run_is_trained_as_the_run_is(tiny, tiny_run, tmp_path, options):
    """With the limits of its clips, its frame rate and its times, which the config of a pipeline lacks."""
    data = dataclasses.replace(tiny.EXPERIMENT.data, max_frames=13, held_out=())
    experiment = tiny.EXPERIMENT.replace_stage("denoiser", times=Uniform(), data=data)
    run = Run.create(tmp_path / "run", experiment)
    (run.folder / "pipeline").symlink_to(tiny_run / "pipeline")
    results = []
    for folder in (run.folder, run.folder / "pipeline"):
        try:
            results.append(make_experiment(folder, **options))
        except UserError as error:
            results.append(str(error))
    of_run, of_pipeline = results
    assert of_pipeline == of_run
    if not options:
        assert (of_pipeline.denoiser.times, of_pipeline.data.max_frames) == (Uniform(), 13)


def open_start(experiment, folder):
    """Return the initial parameters of an experiment's training."""
    opened = open_trainable_denoiser(
        experiment.denoiser, experiment.model, folder, make_mesh(experiment.parallel), is_resuming=False
    )
    return flatten(opened.load_initial(jax.random.key(0)))


def test_an_image_run_gets_temporal_layers_which_alone_are_trained(images, tiny_run, tmp_path):
    experiment = make_experiment(images, train="temporal", max_frames=9, fps=8.0, temporal_layers=2)
    backbone = experiment.model.backbone
    assert isinstance(backbone, SpatioTemporalDiTConfig)
    assert backbone.temporal == TemporalLayers(layers=2)
    assert get_optimizer_config(experiment.denoiser).trainable == (TEMPORAL_PATHS,)
    default = make_experiment(images, train="temporal", max_frames=9, learning_rate=None)
    assert default.denoiser.optimizer.learning_rate == 1e-5
    with pytest.raises(UserError, match=r"max_frames=1 is invalid with train=temporal.* Use max_frames=17"):
        make_experiment(images, train="temporal")
    before, start = get_leaves(images), open_start(experiment, tmp_path)
    assert start.keys() > before.keys()
    assert all(np.array_equal(start[path], leaf) for path, leaf in before.items())
    run = train(experiment, tiny_run, tmp_path / "run")
    after = get_leaves(run.folder)
    for path, leaf in after.items():
        has_changed = np.abs(leaf - start[path]).max() > 0
        assert has_changed == (re.search(TEMPORAL_PATHS, path.partition("/")[2]) is not None), path
    assert dit_video.load(run.folder).generate("a red circle", size=(9, 16, 16), steps=2).frames.shape[0] == 9


@pytest.mark.nightly
def test_a_run_gets_channels_for_a_first_frame(tiny_run, tmp_path):
    experiment = make_experiment(tiny_run, train="full", first_frame_prob=1.0)
    assert experiment.model.backbone.cond_channels == 1 + experiment.model.autoencoder.channels
    start, before = open_start(experiment, tmp_path), get_leaves(tiny_run)
    assert all(np.array_equal(start[path], leaf) for path, leaf in before.items())
    (new,) = start.keys() - before.keys()
    assert np.abs(start[new]).max() == 0
    run = train(experiment, tiny_run, tmp_path / "run")
    assert np.abs(get_leaves(run.folder)[new]).max() > 0
    image = np.zeros((16, 16, 3), np.uint8)
    assert dit_video.load(run.folder).generate("a circle", image=image, size=(5, 16, 16), steps=2).frames.shape[0] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "holds another denoiser than the config's, in backbone: layers is"),
        ({"registers": 2}, "holds another denoiser than the config's, in backbone: registers is 0 there and 2 here"),
    ],
)
def test_what_cannot_be_grown_is_refused_before_anything_is_trained(tiny, tiny_run, tmp_path, change, message):
    experiment = tiny.EXPERIMENT.replace_backbone(**change)
    experiment = experiment.replace_stage("denoiser", train=AllWeights(init_from=str(tiny_run)))
    run = Run.create(tmp_path / "run", experiment)
    with pytest.raises(UserError, match=message):
        run.train((tiny_run / "data").resolve())
    assert not (run.folder / "autoencoder").exists()


def test_folders_that_are_no_start_are_refused_before_anything_is_trained(tiny, tiny_run, images, tmp_path):
    temporal = TemporalWeights(init_from=str(tmp_path))
    experiment = tiny.EXPERIMENT.replace_stage("denoiser", train=temporal)
    with pytest.raises(UserError, match="the denoiser has no temporal layers"):
        Run.create(tmp_path / "none", experiment).train((tiny_run / "data").resolve())
    experiment = experiment.replace_stage("denoiser", train=AllWeights(init_from=str(tmp_path / "nowhere")))
    run = Run.create(tmp_path / "run", experiment)
    with pytest.raises(MissingError, match="nowhere"):
        run.train((tiny_run / "data").resolve())
    assert not (run.folder / "autoencoder").exists()
