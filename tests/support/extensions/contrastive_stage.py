"""Stages of another package: a contrastive training of clips and captions, and a stage that reads its weights."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_video.core.files import write_json
from dit_video.core.registry import register
from dit_video.distributed.gather import to_host
from dit_video.experiment import Stage
from dit_video.training.step import GradientStep, LossDetails, LossOutput
from dit_video.video import decode
from dit_video.weights import load, save

WIDTH = 8


def init(key):
    kernels = jax.random.normal(key, (2, 256, WIDTH)) / 16
    return {"video": kernels[0], "text": kernels[1], "scale": jnp.log(10.0)}


def embed(kernel, features):
    x = features @ kernel
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def contrastive_loss(params, batch, step):
    """Cross-entropy of each clip's caption among those of the batch, and the reverse: it couples the examples."""
    video, text = (embed(params[name], batch[name]) for name in ("video", "text"))
    logits = jnp.exp(params["scale"]) * video @ text.T
    losses = (jnp.diagonal(jax.nn.log_softmax(logits, axis=axis)) for axis in (0, 1))
    accuracy = (logits.argmax(axis=1) == jnp.arange(len(logits))).mean(axis=0)
    return LossOutput(-sum(map(jnp.mean, losses)) / 2, LossDetails({"accuracy": accuracy}))


def count_bytes(values):
    return np.bincount(np.frombuffer(values, np.uint8), minlength=256).astype(np.float32) / len(values)


def draw_batches(clips, seed, size, start):
    """Yield clips with their captions, drawn from the run's seed and the step."""
    for step in itertools.count(start):
        chosen = np.random.default_rng((seed, step)).choice(len(clips), size, replace=False)
        video = [count_bytes(decode(clips[index], frames=1).frames.tobytes()) for index in chosen]
        text = [count_bytes(clips.infos[index].captions[0].encode()) for index in chosen]
        yield {"video": np.stack(video), "text": np.stack(text)}


@register
@dataclass(frozen=True, kw_only=True)
class TrainContrastive(Stage):
    """Training of a joint embedding of clips and captions (CLIP, arXiv 2103.00020)."""

    name: str = "contrastive"
    steps: int
    batch: int = 8
    learning_rate: float = 1e-2
    output = "weights.safetensors"

    def run(self, run):
        step = GradientStep(loss=contrastive_loss, optimizer=optax.adam(self.learning_rate), ema_decay=0.5)
        trainer = run.make_trainer(self.name, steps=self.steps, init=init, train_step=step)
        state = trainer.run(lambda start: draw_batches(run.training_clips, run.seed, self.batch, start))
        save(self.get_output(run), to_host(state.ema))


@register
@dataclass(frozen=True, kw_only=True)
class EmbedCaptions(Stage):
    """Embeddings of the captions, for a later stage."""

    name: str = "captions"
    contrastive: TrainContrastive
    output = "embeddings.json"

    def run(self, run):
        kernel = load(self.contrastive.get_output(run))["text"]
        captions = [info.captions[0] for info in run.training_clips.infos]
        embeddings = {text: np.asarray(embed(kernel, count_bytes(text.encode()))).tolist() for text in captions}
        write_json(self.get_output(run), embeddings)
