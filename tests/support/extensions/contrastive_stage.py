"""Stages of another package: a contrastive training of clips and captions, and a stage that reads its weights."""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


class Batches:
    """Clips with their captions, drawn from the run's seed and the step."""

    def __init__(self, clips, seed, start, size):
        self._clips, self._seed, self._step, self._size = clips, seed, start, size
        self.hash = f"{len(clips)}-{size}-{seed}"

    def __iter__(self):
        return self

    def __next__(self):
        generator = np.random.default_rng((self._seed, self._step))
        chosen = generator.choice(len(self._clips), self._size, replace=False)
        self._step += 1
        video = [count_bytes(decode(self._clips[index], frames=1).frames.tobytes()) for index in chosen]
        text = [count_bytes(self._clips.infos[index].captions[0].encode()) for index in chosen]
        return {"video": np.stack(video), "text": np.stack(text)}

    def close(self):
        pass


@register
@dataclass(frozen=True, kw_only=True)
class TrainContrastive(Stage):
    """Training of a joint embedding of clips and captions (CLIP, arXiv 2103.00020)."""

    name: str = "contrastive"
    steps: int
    batch: int = 8
    learning_rate: float = 1e-2

    def get_weights(self, run):
        """Return the file of the trained weights."""
        return run.folder / self.name / "weights.safetensors"

    def is_done(self, run):
        return self.get_weights(run).exists()

    def run(self, run):
        step = GradientStep(loss=contrastive_loss, optimizer=optax.adam(self.learning_rate), ema_decay=0.5)
        trainer = run.make_trainer(self.name, steps=self.steps, init=init, train_step=step)
        state = trainer.run(lambda start: Batches(run.training_clips, run.seed, start, self.batch))
        save(self.get_weights(run), to_host(state.ema))


@register
@dataclass(frozen=True, kw_only=True)
class EmbedCaptions(Stage):
    """Embeddings of the captions, for a later stage."""

    name: str = "captions"
    contrastive: TrainContrastive

    def get_file(self, run):
        """Return the file of the embeddings."""
        return run.folder / self.name / "embeddings.json"

    def is_done(self, run):
        return self.get_file(run).exists()

    def run(self, run):
        kernel, file = load(self.contrastive.get_weights(run))["text"], self.get_file(run)
        captions = [info.captions[0] for info in run.training_clips.infos]
        file.parent.mkdir(parents=True, exist_ok=True)
        embeddings = {text: np.asarray(embed(kernel, count_bytes(text.encode()))).tolist() for text in captions}
        file.write_text(json.dumps(embeddings))
