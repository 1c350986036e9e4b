"""Train a small CLIP of rendered scenes and their captions, which shows the annotators `clip` and `duplicates`."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import functools
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.rng import make_generator
from dit_video.models.encoders import PretrainedTokenizer
from dit_video.models.features import ClipConfig, ClipImageProcessor, ClipTextConfig, ClipVisionConfig
from dit_video.models.features.clip import l2_normalize, preprocess_frames
from dit_video.nn import get_graph_def, init_params
from dit_video.scenes import Scene, draw_scene, render
from dit_video.tokens import Grid
from dit_video.training.losses.contrastive import ContrastiveLoss, PairFeatures, PairLoss, SigmoidLoss, SoftmaxLoss
from dit_video.training.step import GradientStep
from dit_video.weights import save_clip, save_clip_image_processor

Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
_SIDE, _POSITIONS, _TEST_SEED, _TEST_CLIPS = 48, 36, 10**6, 256
_SIZES = (Grid(3, 48, 48), Grid(3, 48, 64), Grid(3, 64, 48))
_FRAMES = 2
"""Number of frames of each scene that are trained on."""
_PROCESSOR = ClipImageProcessor(resize=(_SIDE, _SIDE), crop=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
_UNKNOWN, _START, _END = "<|unknown|>", "<|startoftext|>", "<|endoftext|>"


class _Pairs(NamedTuple):
    """Frames of scenes with the token ids of their captions."""

    images: np.ndarray
    """Frames `n f 48 48 3`, uint8."""
    ids: np.ndarray
    mask: np.ndarray
    groups: np.ndarray
    """Number of each scene's caption."""


def main(
    out: Out, clips: int = 4000, steps: int = 1000, batch: int = 128, seed: int = 0, sigmoid: bool = False
) -> None:
    """Train a small CLIP of rendered scenes, and print how well it finds the captions of other scenes.

    For example:

        python tools/train_scene_clip.py scene_clip
        python tools/train_scene_clip.py scene_clip --clips 1000 --steps 200 --sigmoid

    The folder holds a `CLIPModel` of `transformers` with a tokenizer and image settings, like
    `openai/clip-vit-large-patch14`. It takes less than ten minutes on two cores.

    Args:
        out: Folder to write.
        clips: Number of rendered scenes, of levels 1 and 2 in turn.
        steps: Number of training steps.
        batch: Number of frames and captions that are compared with each other.
        seed: Seed of the scenes and the weights.
        sigmoid: Use the sigmoid loss of SigLIP instead of CLIP's softmax.
    """
    check_minimum(2, batch=batch)
    check_minimum(1, steps=steps)
    if clips < batch:
        raise UserError(f"--clips {clips} is invalid: a batch has {batch} clips. Use --clips {batch} or more.")
    start = time.perf_counter()
    scenes, tests = _draw(clips, seed), _draw(_TEST_CLIPS, _TEST_SEED)
    words = sorted({word for scene in scenes + tests for word in re.findall(r"\w+", scene.caption)})
    write_tokenizer(out, words)
    save_clip_image_processor(out, _PROCESSOR)
    tokenize = PretrainedTokenizer(out, max_tokens=_POSITIONS)
    pairs = _render(scenes, tokenize, seed)
    print(f"{clips} scenes rendered in {time.perf_counter() - start:.0f} s", flush=True)
    config = _make_config(tokenize)
    graph = get_graph_def(config.make)
    pair_loss: PairLoss = SigmoidLoss() if sigmoid else SoftmaxLoss()
    loss = ContrastiveLoss(embed=functools.partial(_embed, graph), pair_loss=pair_loss)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 1e-3), weight_decay=0.05)
    train_step = GradientStep(loss=loss, optimizer=optimizer, ema_decay=0.99)
    towers = init_params(config.make, jax.random.key(seed))
    state, step = train_step.init({"towers": towers, "pairs": pair_loss.init()}), train_step.compile()
    generator, accuracies = make_generator(seed, "batches of scenes"), []
    for number in range(1, steps + 1):
        state, metrics = step(state, _draw_batch(pairs, generator, batch))
        accuracies.append(float(metrics["accuracy"]))
        if number % 100 == 0 or number == steps:
            seconds = time.perf_counter() - start
            print(f"step {number}: {np.mean(accuracies[-100:]):.1%} right of {batch}, {seconds:.0f} s", flush=True)
    save_clip(out, config, state.ema["towers"])
    _print_accuracy(graph, state.ema["towers"], _render(tests, tokenize, _TEST_SEED))


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """Write a tokenizer of words, with CLIP's start and end tokens."""
    tokens = [_UNKNOWN, *words, ",", _START, _END]
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=_UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    special = [(token, tokens.index(token)) for token in (_START, _END)]
    tokenizer.post_processor = TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=special)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def _make_config(tokenize: PretrainedTokenizer) -> ClipConfig:
    end = int(tokenize("a")[-1])
    tower: dict[str, Any] = {"width": 96, "heads": 4, "mlp_width": 384, "projection": 64}
    text = ClipTextConfig(**tower, layers=2, vocabulary=tokenize.max_id + 1, positions=_POSITIONS, end_token=end)
    return ClipConfig(text=text, vision=ClipVisionConfig(**tower, layers=3, size=_SIDE, patch=8))


def _embed(graph: Any, params: Any, batch: dict[str, Any]) -> PairFeatures:
    model = nnx.merge(graph, params)
    images = batch["images"].astype(jnp.float32) / 255
    images = (images - jnp.array(_PROCESSOR.mean)) / jnp.array(_PROCESSOR.std)
    texts = model.text(batch["ids"], batch["mask"]).projected
    return PairFeatures(model.vision(images).projected, texts, batch["groups"])


def _draw(count: int, seed: int) -> list[Scene]:
    return [draw_scene(number, seed=seed, level=1 + number % 2, sizes=_SIZES) for number in range(count)]


def _render(scenes: Sequence[Scene], tokenize: PretrainedTokenizer, seed: int) -> _Pairs:
    generator, images = make_generator(seed, "frames of scenes"), []
    unscaled = ClipImageProcessor(resize=_PROCESSOR.resize, crop=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for scene in scenes:
        frames = render(scene).clip.frames
        chosen = np.sort(generator.choice(len(frames), _FRAMES, replace=False))
        images.append(np.rint(255 * preprocess_frames(frames[chosen], unscaled)).astype(np.uint8))
    ids, mask = np.zeros((2, len(scenes), _POSITIONS), np.int32)
    for row, scene in enumerate(scenes):
        tokens = tokenize(scene.caption)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    _, groups = np.unique([scene.caption for scene in scenes], return_inverse=True)
    return _Pairs(np.stack(images), ids, mask, groups.astype(np.int32))


def _draw_batch(pairs: _Pairs, generator: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    rows = generator.choice(len(pairs.ids), size, replace=False)
    frames = generator.integers(pairs.images.shape[1], size=size)
    images = pairs.images[rows, frames]
    return {"images": images, "ids": pairs.ids[rows], "mask": pairs.mask[rows], "groups": pairs.groups[rows]}


def _print_accuracy(graph: Any, params: Any, pairs: _Pairs) -> None:
    """Print how often the right one of all captions is nearest to a frame, and nearer than a wrong one."""
    batch = {"images": pairs.images[:, 0], "ids": pairs.ids, "mask": pairs.mask, "groups": pairs.groups}
    features = jax.jit(functools.partial(_embed, graph))(params, batch)
    cosines = np.asarray(l2_normalize(features.images) @ l2_normalize(features.texts).T)
    right = np.diagonal(cosines)
    is_nearest = (cosines <= right[:, None]).all(axis=1).mean()
    wrong = np.roll(np.arange(len(cosines)), 1)
    is_nearer = (right > cosines[np.arange(len(cosines)), wrong]).mean()
    print(f"right caption of {len(cosines)}: {is_nearest:.1%}; right rather than a wrong one: {is_nearer:.1%}")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
