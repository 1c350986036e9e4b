"""Clips that are made frame by frame, of actions: with and without kept keys and values."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dit_video
from dit_video.core.errors import UserError
from dit_video.diffusion import Heun, sample
from dit_video.experiment import Run
from dit_video.models.backbones.denoise import make_denoise_fn, make_text_record
from dit_video.models.conditioning import Conditioning, FrameActions
from dit_video.nn import get_graph_def
from dit_video.nn.attention import CausalFrames, Full
from dit_video.sampling import Sampling
from dit_video.sampling.rollout import Rollout
from dit_video.sampling.sampler import draw_initial_noise
from dit_video.tokens import Grid, PackedRows, compute_positions, patchify
from dit_video.video import decode
from dit_video.weights.frozen_encoders import open_tokenizer
from support.extending import replace_backbone, shorten
from support.random_params import make_random_params

SIZE = Grid(9, 16, 32)
ACTIONS = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
STEPS = (slice(0, 1), slice(1, 5), slice(5, 9))
SAMPLING = Sampling(steps=3, solver=Heun())


@pytest.fixture(scope="module")
def world(tiny, tiny_run, tiny_clips, tmp_path_factory):
    """Return the folder of a short run of a causal model with actions."""
    folder = tmp_path_factory.mktemp("world")
    for path in (tiny_clips / "clips").iterdir():
        if path.suffix in (".mp4", ".png"):
            target = folder / "actions" / path.relative_to(tiny_clips).with_name(f"{path.name}.npy")
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, np.zeros((len(decode(path).frames), 2), np.float32))
    fields = {"pattern": CausalFrames(), "absolute_position": None, "time": "token", "layers": 2}
    fields["conditioning"] = (FrameActions(folder=str(folder / "actions")),)
    experiment = shorten(replace_backbone(tiny.EXPERIMENT, **fields), tiny_run)
    experiment = experiment.replace_stage("denoiser", time_per="frame")
    Run.create(folder / "run", experiment).train((tiny_run / "data").resolve())
    return folder / "run"


@pytest.fixture(scope="module")
def random_world(world):
    """Return the run's pipeline with random weights, whose predictions depend on all inputs."""
    pipeline = dit_video.load(world)
    return pipeline.replace(denoiser={"backbone": make_random_params(pipeline.config.model.backbone.make)})


def roll_out(pipeline, actions, **options):
    rollout = Rollout(pipeline, "a red circle", size=SIZE, seed=3, sampling=SAMPLING, **options)
    for part in STEPS:
        rollout.step(actions=actions[part])
    return rollout


def compute_without_cache(pipeline, actions):
    """Return the latents' tokens, of which every frame is predicted with all earlier ones, clean at time 0."""
    config, model = pipeline.config, pipeline.config.model
    grid, frame = Grid(3, 1, 2), 2
    noise = patchify(draw_initial_noise(3, model.latent_grid(SIZE), 4), model.backbone.patch)[None]
    positions = compute_positions(grid, step=(config.token_dt, 1.0, 1.0))[None]
    text = nnx.merge(get_graph_def(model.text_encoder.make), pipeline.denoiser_params["text"])
    tokens = jnp.asarray(open_tokenizer(model.text_encoder)("a red circle"))[None]
    context = text(tokens, jnp.ones(tokens.shape, jnp.int32))
    values = pipeline.model_parts.conditioning["actions"].from_request(actions, model.latent_grid(SIZE))
    backbone = nnx.merge(get_graph_def(model.backbone.make), pipeline.denoiser_params["backbone"])
    clean = noise[:, :0]
    for number in range(grid.t):
        last = (number + 1) * frame
        ids = jnp.ones((1, last), jnp.int32)
        layout = PackedRows(segments=ids, positions=jnp.asarray(positions[:, :last]), count=1)
        own = FrameActions.record(jnp.repeat(jnp.asarray(values[: number + 1]), frame, axis=0)[None])
        denoise = make_denoise_fn(backbone, layout, Conditioning(make_text_record(context, layout), own))

        def denoise_last(noisy, time, state, denoise=denoise, clean=clean):
            is_clean = jnp.arange(clean.shape[1] + noisy.shape[1])[None] < clean.shape[1]
            tokens = jnp.concatenate([clean, noisy], axis=1)
            return denoise(tokens, jnp.where(is_clean, 0.0, time), None)[0][:, clean.shape[1] :], state

        times = SAMPLING.make_times(model.process)
        options = {"process": model.process, "solver": SAMPLING.solver, "model_times": times.model_times}
        part = jnp.asarray(noise[:, number * frame : last])
        clean = jnp.concatenate([clean, sample(denoise_last, part, jnp.asarray(times.times), **options)], axis=1)
    return np.asarray(clean[0])


@pytest.mark.slow
def test_frames_equal_those_without_kept_keys_and_values(world, random_world):
    for pipeline in (dit_video.load(world), random_world):
        rollout = roll_out(pipeline, ACTIONS)
        own = patchify(rollout.latents, pipeline.config.model.backbone.patch)
        np.testing.assert_allclose(own, compute_without_cache(pipeline, ACTIONS), atol=1e-5)
        assert rollout.clip.frames.shape == (*SIZE, 3)


def test_an_action_changes_its_frame_and_those_after_it_in_one_program(random_world):
    first = roll_out(random_world, ACTIONS)
    changed = roll_out(random_world, ACTIONS * np.where(np.arange(9) < 1, 1, -1)[:, None])
    difference = np.abs(first.latents - changed.latents).max(axis=(1, 2, 3))
    assert difference[0] == 0
    assert (difference[1:] > 1e-4).all()
    later = roll_out(random_world, ACTIONS * np.where(np.arange(9) < 5, 1, -1)[:, None])
    difference = np.abs(first.latents - later.latents).max(axis=(1, 2, 3))
    assert not difference[:2].any()
    assert difference[2] > 1e-4
    assert first._sample._cache_size() == 1
    without = Rollout(random_world, "a red circle", size=SIZE, seed=3, sampling=SAMPLING)
    assert np.abs(without.step() - roll_out(random_world, 0 * ACTIONS).latents[:1]).max() < 1e-6


def test_actions_of_a_whole_clip_are_sampled_at_once_too(random_world):
    clips = [
        random_world.generate("a red circle", size=SIZE, steps=2, conditioning={"actions": sign * ACTIONS})
        for sign in (1, -1)
    ]
    assert (clips[0].frames != clips[1].frames).any()


def test_what_cannot_be_rolled_out_is_refused(world, random_world, tiny_pipeline):
    rollout = roll_out(random_world, ACTIONS)
    with pytest.raises(UserError, match=r"the clip has all of its 3 latent frames\. Use a larger size"):
        rollout.step(actions=ACTIONS[:4])
    other = Rollout(random_world, "a red circle", size=SIZE)
    with pytest.raises(UserError, match="conditioning speed is unknown to this model; use actions"):
        other.step(speed=[[1.0]])
    with pytest.raises(UserError, match="this model cannot roll out"):
        Rollout(tiny_pipeline, "a red circle")
    model = random_world.config.model
    whole = random_world.config.replace_model(backbone=dataclasses.replace(model.backbone, pattern=Full()))
    with pytest.raises(
        UserError, match="a cache is invalid for this model: finished frames must not depend on later ones"
    ):
        Rollout(random_world.replace(config=whole), "a red circle")
