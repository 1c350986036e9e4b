"""A training loop of another package: rows, loss, step, state and checkpoints are those of a run."""

import contextlib

import jax

from dit_video.core import rng
from dit_video.experiment.denoiser import init_denoiser, make_denoiser_step
from dit_video.training.checkpoint import Checkpoints


def train(run, folder, *, until, save_every=2):
    """Train the denoiser of a prepared run whose autoencoder is trained, and return its averaged parameters."""
    stage = run.experiment.denoiser
    stage.encode_latents(run)
    captions, open_rows = stage.open_inputs(run)
    step = make_denoiser_step(stage, stage.make_loss(run, captions))
    update, checkpoints = step.compile(), Checkpoints(folder)
    state = jax.jit(lambda key: step.init(init_denoiser(run.model, key)))(rng.key(run.seed, "denoiser"))
    if checkpoints.latest() is not None:
        state, _ = checkpoints.restore(state)
    start = int(state.step)
    with contextlib.closing(open_rows(start)) as rows:
        for number in range(start + 1, until + 1):
            state, _ = update(state, next(rows))
            if number % save_every == 0:
                checkpoints.save(number, state, {"plan": rows.hash})
    checkpoints.wait()
    return state.ema
