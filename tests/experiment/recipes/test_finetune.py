"""Experiments made from a folder of Wan, and the parameters that they train."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dit_video
from dit_video.core import config_json
from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten
from dit_video.data.latents.cache import CachedCaptions
from dit_video.data.latents.plan import plan_encoding
from dit_video.data.sizes import read_fitted_clip
from dit_video.diffusion import RectifiedFlow, UniPc, UniPcFlowSchedule
from dit_video.distributed import Parallelism, make_mesh
from dit_video.experiment import AllWeights, ExpertConfig, LoraAdapters, TemporalWeights, input_pipeline
from dit_video.experiment.autoencoder import read_autoencoder
from dit_video.experiment.denoiser import (
    add_other_expert,
    get_expert_names,
    get_optimizer_config,
    get_time_range,
    open_trainable_denoiser,
)
from dit_video.experiment.encoders import check_encoders
from dit_video.experiment.export import save_transformer
from dit_video.experiment.initial_weights import check_initial_weights
from dit_video.experiment.latents import make_encoding, open_latents
from dit_video.experiment.recipes.finetune import FineTuningOptions, make_finetuning_experiment
from dit_video.experiment.run import Run
from dit_video.families import load_denoiser
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.nn import LoraConfig
from dit_video.sampling.completion import Completion
from dit_video.sampling.request import Request
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.weights.frozen_encoders import FrozenImageEncoder, open_image_encoder
from support.random_params import make_random_params
from support.tiny_clip import VISION, write_clip
from support.tiny_vace import CONFIG as CONTROLLED
from support.tiny_vace import write_vace
from support.tiny_wan import ANIMATING, DIT, TWO, VAE, write_animating_wan, write_wan

OPTIONS = FineTuningOptions(max_pixels=32 * 48, max_frames=5, dtype="float32", steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("wan") / "tiny"
    write_wan(folder)
    return folder


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Parallelism())


def make_experiment(folder, **options):
    return make_finetuning_experiment(folder, dataclasses.replace(OPTIONS, **options))


def open_denoiser(experiment, folder, mesh, *, is_resuming=False):
    """Return what an experiment trains of its denoiser."""
    return open_trainable_denoiser(experiment.denoiser, experiment.model, folder, mesh, is_resuming=is_resuming)


def test_the_experiment_of_fine_tuning_follows_from_the_folder(folder):
    experiment = make_finetuning_experiment(folder, OPTIONS)
    model, text = experiment.model, experiment.model.text_encoder
    assert experiment.name == "tiny"
    assert (experiment.autoencoder, model.autoencoder) == (None, VAE)
    assert experiment.autoencoder_from == str(folder / "vae")
    assert model.backbone == dataclasses.replace(DIT, remat="full")
    remat = make_experiment(folder, remat="attention")
    assert remat.model.backbone == dataclasses.replace(DIT, remat="attention")
    assert (text.folder, text.width, text.cleaned) == (str(folder / "text_encoder"), 16, True)
    assert model.process == RectifiedFlow(shift=3.0)
    assert (experiment.sampling.solver, experiment.sampling.time_schedule) == (UniPc(), UniPcFlowSchedule())
    assert (model.layout.tokens, model.fps) == (2 * 4 * 6, 16.0)
    assert experiment.denoiser.train == LoraAdapters(init_from=str(folder), lora=OPTIONS.lora)
    assert model.frame_conditioning is None
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(experiment)))) == experiment


def test_the_defaults_of_fine_tuning_are_the_models(folder, tmp_path):
    experiment = make_finetuning_experiment(folder)
    assert (experiment.data.max_pixels, experiment.data.max_frames, experiment.model.fps) == (480 * 832, 81, 16.0)
    write_wan(tmp_path / "told", backbone=dataclasses.replace(DIT, time="token"))
    experiment = make_finetuning_experiment(tmp_path / "told")
    assert (experiment.data.max_pixels, experiment.data.max_frames, experiment.model.fps) == (704 * 1280, 121, 24.0)
    assert experiment.model.frame_conditioning == FrameConditioning()
    assert make_finetuning_experiment(
        tmp_path / "told", FineTuningOptions(first_frame_prob=0.2)
    ).model.frame_conditioning == FrameConditioning(prob=0.2)


@pytest.fixture(scope="module")
def animating(tmp_path_factory):
    """Return the folder of an image-to-video model, to be read only."""
    folder = tmp_path_factory.mktemp("wan") / "animating"
    write_animating_wan(folder)
    return folder


def test_an_image_to_video_model_always_trains_with_its_first_frame(animating):
    experiment = make_finetuning_experiment(animating, OPTIONS)
    assert experiment.model.backbone == dataclasses.replace(ANIMATING, remat="full")
    assert experiment.model.frame_conditioning == FrameConditioning(prob=1.0, rest="grey")
    assert experiment.model.image_encoder == str(animating / "image_encoder")
    model = make_experiment(animating, first_frame_prob=0.9).model
    assert model.frame_conditioning == FrameConditioning(prob=0.9, rest="grey")
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(experiment)))) == experiment


@pytest.mark.slow
def test_training_and_sampling_receive_the_same_image_conditioning(animating, tmp_path):
    """This holds for a stretch that begins within its clip, and for its mirror image."""
    clips = shapes.write_folder(tmp_path / "clips", count=2, seed=0, sizes=(Grid(9, 32, 48), Grid(9, 32, 32)))
    experiment = make_finetuning_experiment(animating, dataclasses.replace(OPTIONS, clips_per_video=2))
    data = dataclasses.replace(experiment.data, flips=True)
    run = Run.create(tmp_path / "run", dataclasses.replace(experiment, data=data))
    run.prepare(clips)
    run.experiment.denoiser.encode_latents(run)
    latents, encoding, clips = open_latents(run, run.folder / "latents"), make_encoding(run), run.training_clips
    assert latents.identity["image"] == FrozenImageEncoder(animating).identity
    assert latents.identity["behind"] == "grey"
    model = dit_video.load(animating).model_parts
    views = {view.name: view for view in plan_encoding(clips, encoding).views}
    assert {view.start > 0 for view in views.values()} == {True, False} == {view.flipped for view in views.values()}
    chosen = [
        next(view for view in views.values() if view.start and view.flipped == flipped) for flipped in (False, True)
    ]
    for view in chosen:
        index = latents.names.index(view.name)
        frame = read_fitted_clip(clips, view.clip, view.limits, start=view.start).frames[0]
        request = Request("", view.size, image=frame[:, ::-1] if view.flipped else frame)
        expected = {field.name: values for field, values in Completion()(request, model).fields.items()}
        cond_latents, image = (latents.read_field(index, field) for field in latents.fields)
        scale = np.abs(expected["image_tokens"]).max()
        np.testing.assert_allclose(image, expected["image_tokens"], atol=2**-8 * scale)
        visible = expected["cond_latents"][..., -VAE.channels :]
        np.testing.assert_allclose(cond_latents, visible, atol=2**-8 * np.abs(visible).max() + 1e-4)
        assert np.abs(cond_latents[1:] - latents[index][1:]).max() > 1e-2
    source = input_pipeline.make_latent_examples(run, latents, CachedCaptions(latents))
    rows = next(input_pipeline.open_rows(run, run.experiment.denoiser, source, run.training_clips)(0))
    tokens = VISION.tokens
    assert rows.fields["image_tokens"].shape == (1, 4 * tokens, VISION.width)
    kept = [latents.read_field(index, latents.fields[1]) for index in range(len(latents))]
    for segment in range(1, rows.segments.max() + 1):
        own = rows.fields["image_tokens"][0, np.asarray(rows.layout.get_sequence_segments(tokens))[0] == segment]
        assert any(np.array_equal(own, image) for image in kept)


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """Return the folder of a model with control, to be read only."""
    folder = tmp_path_factory.mktemp("vace") / "controlled"
    write_vace(folder)
    return folder


@pytest.mark.nightly
def test_a_model_with_control_keeps_its_task_and_its_conditioning(controlled):
    experiment = make_finetuning_experiment(controlled, OPTIONS)
    assert experiment.model.backbone == CONTROLLED.replace(remat="full")
    assert experiment.conditioner == dit_video.load(controlled).config.conditioner
    assert experiment.model.frame_conditioning is None
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(experiment)))) == experiment
    with pytest.raises(UserError, match="first_frame_prob is invalid"):
        make_experiment(controlled, first_frame_prob=0.5)


@pytest.mark.slow
def test_training_and_sampling_receive_the_same_control(controlled, tmp_path):
    """The first frame of a clip is kept; an image is generated."""
    clips = shapes.write_folder(tmp_path / "clips", count=2, seed=0, sizes=(Grid(9, 32, 48), Grid(1, 32, 32)))
    run = Run.create(tmp_path / "run", make_finetuning_experiment(controlled, OPTIONS))
    run.prepare(clips)
    run.experiment.denoiser.encode_latents(run)
    latents, encoding, clips = open_latents(run, run.folder / "latents"), make_encoding(run), run.training_clips
    model = dit_video.load(controlled, dtype="float32").model_parts
    for view in plan_encoding(clips, encoding).views:
        index = latents.names.index(view.name)
        frame = read_fitted_clip(clips, view.clip, view.limits, start=view.start).frames[0]
        request = Request("", view.size, image=frame if view.size.t > 1 else None)
        (expected,) = model.conditioner(request, model).fields.values()
        control = latents.read_field(index, latents.fields[0])
        np.testing.assert_allclose(control, expected, atol=2**-8 * np.abs(expected).max() + 1e-4)


def test_another_image_encoder_is_refused(animating, tmp_path):
    moved = shutil.copytree(animating / "image_encoder", tmp_path / "image_encoder")
    shutil.copytree(animating / "image_processor", tmp_path / "image_processor")
    first = open_image_encoder(moved, identity_file=tmp_path / "kept.json")
    write_clip(moved, VISION, seed=1)
    again = open_image_encoder(moved, identity_file=tmp_path / "kept.json")
    assert again.identity == first.identity  # computed without the weights
    with pytest.raises(UserError, match="was used before; put that one back"):
        again(np.zeros((1, 16, 16, 3), np.uint8))
    wider = dataclasses.replace(ANIMATING, image_width=16)
    model = dataclasses.replace(make_experiment(animating).model, backbone=wider, image_encoder=str(moved))
    with pytest.raises(UserError, match="makes tokens of width 12, the denoiser reads 16; set backbone image_width=12"):
        check_encoders(model, tmp_path)


@pytest.mark.parametrize(
    ("train", "expected", "rate"),
    [
        ("lora", (LoraAdapters, True), 1e-4),
        ("full", (AllWeights, True), 1e-5),
        ("scratch", (AllWeights, False), 1e-4),
    ],
)
def test_one_option_chooses_the_trained_parameters_and_their_learning_rate(folder, train, expected, rate):
    training = make_experiment(folder, train=train).denoiser
    assert (type(training.train), training.train.init_from is not None) == expected
    assert training.optimizer.learning_rate == rate
    assert get_optimizer_config(training).trainable == ()


def test_initial_weights_are_read_from_the_folder_and_placed_on_the_devices(folder, mesh, tmp_path):
    trained = open_denoiser(make_experiment(folder, train="full"), tmp_path, mesh)
    expected = flatten(load_denoiser(folder / "transformer")[1])
    result = flatten(trained.load_initial(jax.random.key(0))["backbone"])
    assert trained.base_params is None
    for path, leaf in expected.items():
        assert isinstance(result[path], jax.Array)
        np.testing.assert_array_equal(result[path], leaf)
    for choice, continues in (("full", True), ("scratch", False)):
        started = open_denoiser(make_experiment(folder, train=choice), tmp_path, mesh, is_resuming=continues)
        assert started.load_initial is None


def test_adapted_weights_are_kept_in_the_dtype_of_the_products(folder, mesh, tmp_path):
    lora = LoraConfig(rank=2, alpha=3.0, targets=("query/kernel$",))
    trained = open_denoiser(make_experiment(folder, dtype="bfloat16", lora=lora), tmp_path, mesh)
    adapted = flatten(trained.base_params)
    assert adapted["backbone/blocks/up/kernel"].dtype == jnp.bfloat16
    assert adapted["backbone/modulation/kernel"].dtype == adapted["backbone/head/kernel"].dtype == jnp.float32
    assert adapted["backbone/blocks/up/bias"].dtype == adapted["backbone/blocks/query_norm/scale"].dtype == jnp.float32
    factors = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), trained.init(jax.random.key(0)))
    assert set(flatten(factors)) == {f"backbone/blocks/{path}/kernel/{part}" for path in QUERIES for part in "ab"}
    whole = flatten(trained.merge_params(factors))
    for path, leaf in adapted.items():
        changed = path.removeprefix("backbone/blocks/").removesuffix("/kernel") in QUERIES
        np.testing.assert_allclose(whole[path] - np.asarray(leaf), 0.03 if changed else 0, atol=0.02 if changed else 0)


QUERIES = ("query", "cross_query")


def test_the_autoencoder_is_read_from_its_folder_and_not_copied(folder, tmp_path):
    run = Run(folder=tmp_path, experiment=make_finetuning_experiment(folder, OPTIONS))
    expected = flatten(make_random_params(VAE.make))
    for path, leaf in flatten(run.codec().params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert not (tmp_path / "autoencoder").exists()
    assert run.linear_baseline() is None
    other, start = dataclasses.replace(VAE, width=16), run.experiment.autoencoder_from
    with pytest.raises(UserError, match="holds another autoencoder than the config's: width is 8 there and 16 here"):
        read_autoencoder(other, tmp_path, pretrained=start, is_trained=False)


def test_models_that_cannot_be_trained_are_refused_first(folder):
    fix = "a model of WanDitConfig cannot get temporal layers. Use an image model of DiTConfig, such as DiT or SiT, or"
    with pytest.raises(UserError, match=fix):
        make_experiment(folder, train="temporal")
    layered = SpatioTemporalDiTConfig(channels=DIT.channels, context_width=DIT.context_width)
    layered = make_experiment(folder).replace_model(backbone=layered)
    with pytest.raises(UserError, match=f"init_from=.* is invalid: {fix}"):
        check(layered.replace_stage("denoiser", train=TemporalWeights(init_from=str(folder))))
    with pytest.raises(UserError, match="adapters of backbone/embed/kernel can't be written"):
        check(make_experiment(folder, lora=LoraConfig(targets=("kernel$",))))
    check(make_experiment(folder).replace_backbone(position_stretch=(2.0, 1.0, 1.0)))  # it has no weights of its own
    with pytest.raises(UserError, match="holds another denoiser than the config's, in the transformer: layers is 2"):
        check(make_experiment(folder).replace_backbone(layers=3))


def check(experiment):
    check_initial_weights(experiment.denoiser, experiment.model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"_class_name": "FluxPipeline"}, UserError, "class FluxPipeline; known here: .*WanPipeline"),
        (TWO, MissingError, "lacks the folders transformer_2"),
    ],
)
def test_unsupported_and_incomplete_pipelines_are_refused(folder, tmp_path, change, error, message):
    copied = shutil.copytree(folder, tmp_path / "copied")
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(error, match=message):
        make_finetuning_experiment(copied, OPTIONS)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("wan") / "two"
    write_wan(folder, **TWO)
    return folder


@pytest.mark.parametrize(
    ("expert", "names"),
    [
        ("high", ("transformer", "transformer_2")),
        pytest.param("low", ("transformer_2", "transformer"), marks=pytest.mark.slow),
    ],
)
def test_one_of_two_experts_is_trained_at_its_times(two, mesh, tmp_path, expert, names):
    experiment = make_experiment(two, expert=expert)
    training, model = experiment.denoiser, experiment.model
    own, other = (str(two / name) for name in names)
    assert training.train.init_from == own
    assert training.expert == ExpertConfig(expert=expert, boundary=0.875, other_folder=other)
    first, last = get_time_range(training, model)
    boundary, end, whole = (first, last, 1.0) if expert == "high" else (last, first, 0.0)
    assert end == whole
    assert float(training.make_objective(model).compute_time(jnp.float32(boundary))) == pytest.approx(0.875, abs=1e-5)
    check(experiment)
    both = add_other_expert(training, model, open_denoiser(experiment, tmp_path, mesh).base_params)
    for name, path in zip(get_expert_names(training), (own, other), strict=True):
        expected = flatten(load_denoiser(path)[1])
        for leaf, value in flatten(both[name]).items():
            np.testing.assert_array_equal(value, expected[leaf], err_msg=leaf)


def test_two_experts_are_trained_one_at_a_time(folder, two, tmp_path):
    with pytest.raises(UserError, match="two experts, which are trained one at a time; set expert=high"):
        make_experiment(two)
    with pytest.raises(UserError, match=r"expert=low is invalid: .* one transformer; leave out expert"):
        make_experiment(folder, expert="low")
    with pytest.raises(UserError, match=r"boundary=875.0 is invalid: it must be a time between 0 and 1"):
        ExpertConfig(expert="low", boundary=875.0, other_folder="transformer")
    write_wan(tmp_path / "other", backbone=dataclasses.replace(DIT, layers=3))
    experiment = make_experiment(two, expert="low")
    train = experiment.denoiser.train
    unlike = dataclasses.replace(train.expert, other_folder=str(tmp_path / "other" / "transformer"))
    with pytest.raises(UserError, match="other/transformer holds another denoiser"):
        check(experiment.replace_stage("denoiser", train=dataclasses.replace(train, expert=unlike)))


def test_a_text_to_video_model_gets_the_channels_of_image_to_video_models(folder, tmp_path):
    """It grows to the layout of Wan 2.2 I2V, is the same at first, and is written as that class's."""
    experiment = make_experiment(folder, train="full", first_frame_prob=0.5)
    model = experiment.model
    assert model.backbone.cond_channels == VAE.stride.t + VAE.channels
    assert model.frame_conditioning == FrameConditioning(prob=0.5, rest="grey")
    _, before = load_denoiser(folder / "transformer")
    opened = open_trainable_denoiser(
        experiment.denoiser, model, tmp_path, make_mesh(experiment.parallel), is_resuming=False
    )
    start = opened.load_initial(jax.random.key(0))["backbone"]
    for path, leaf in flatten(before).items():
        if path != "embed/kernel":
            np.testing.assert_array_equal(flatten(start)[path], leaf, err_msg=path)
    kernel = start["embed"]["kernel"].reshape(model.backbone.patch.volume, -1, model.backbone.width)
    old = before["embed"]["kernel"].reshape(model.backbone.patch.volume, -1, model.backbone.width)
    np.testing.assert_array_equal(kernel[:, : VAE.channels], old)
    assert not np.any(kernel[:, VAE.channels :])
    save_transformer(tmp_path, model.backbone, {"backbone": start})
    config, _ = load_denoiser(tmp_path / "transformer")
    assert config.cond_channels == model.backbone.cond_channels


def test_folders_of_an_experiment_do_not_depend_on_the_working_directory(folder, two, monkeypatch):
    """A run is resumed, and its checkpoints are loaded, from elsewhere."""
    experiments = make_experiment(folder), make_experiment(two, expert="low")
    monkeypatch.chdir(folder.parent)
    assert make_experiment(folder.name) == experiments[0]
    monkeypatch.chdir(two.parent)
    assert make_experiment(two.name, expert="low") == experiments[1]


@pytest.mark.parametrize("files", [None, [], ["config.json", "Wan2.1_VAE.pth"], ["wan2.1_t2v.safetensors"]])
def test_what_cannot_be_loaded_is_refused_as_loading_does(tmp_path, files):
    path = tmp_path / "model"
    for name in files or ():
        path.mkdir(exist_ok=True)
        (path / name).write_text("")
    if files is None:
        path.write_text("")
    errors = []
    for open_model in (dit_video.load, make_finetuning_experiment):
        with pytest.raises(UserError) as error:
            open_model(path)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_options_that_do_not_fit_the_model_are_refused(folder, tmp_path):
    with pytest.raises(MissingError, match=r"holds no model: it needs pipeline\.json of a finished run"):
        make_finetuning_experiment(Run.create(tmp_path / "run", make_experiment(folder)).folder)
    with pytest.raises(UserError, match=r"the first frame, which train=lora does not train.* Use train=full"):
        make_experiment(folder, first_frame_prob=0.5)
    with pytest.raises(UserError, match="must be positive"):
        FineTuningOptions(learning_rate=-1.0)
    with pytest.raises(UserError, match=r"T=6 is not 1 \+ 4k"):
        make_experiment(folder, max_frames=6)
