"""Train the classifier of rendered scenes, whose features the metrics of evaluations use."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import script
from dit_video.core.rng import make_generator
from dit_video.nn import get_graph_def, init_params
from dit_video.scenes import Scene, draw_scene, render
from dit_video.scenes.features import (
    LABELS,
    SCENE_WEIGHTS,
    SceneClassifier,
    compute_label_loss,
    list_labels,
    make_scene_pixels,
)
from dit_video.tokens import Grid
from dit_video.weights import save

_BATCH, _TEST_SEED = 32, 10**6
_SIZES = (Grid(17, 32, 32), Grid(17, 32, 48), Grid(17, 48, 32), Grid(17, 48, 48))


def main(
    out: Annotated[Path, tyro.conf.Positional] = SCENE_WEIGHTS,
    clips: int = 8000,
    steps: int = 4000,
    seed: int = 0,
) -> None:
    """Train the classifier of rendered scenes, and print how well it recognises the labels of other scenes.

    For example:

        python tools/train_scene_classifier.py
        python tools/train_scene_classifier.py classifier.safetensors --clips 3000 --steps 1000

    Args:
        out: File of the weights.
        clips: Number of rendered clips, of the three levels in turn.
        steps: Number of training steps of 32 clips.
        seed: Seed of the clips and the weights.
    """
    check_minimum(_BATCH, clips=clips)
    check_minimum(1, steps=steps)
    start = time.perf_counter()
    pixels, labels = _render(clips, seed)
    print(f"{clips} clips rendered in {time.perf_counter() - start:.0f} s")
    graph = get_graph_def(_make)
    params = init_params(_make, jax.random.key(seed))
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3), weight_decay=0.02)
    optimizer_state = optimizer.init(params)

    @jax.jit
    def step(params: Any, optimizer_state: Any, clips: Array, labels: Array) -> tuple[Any, Any, Float[Array, ""]]:
        def loss(params: Any) -> Float[Array, ""]:
            model = nnx.merge(graph, params)
            return compute_label_loss(model.classify(model(clips)), labels).mean(axis=0)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, value

    generator, losses = make_generator(seed, "batches of scenes"), []
    for number in range(1, steps + 1):
        chosen = generator.choice(clips, _BATCH, replace=False)
        batch = jnp.asarray(pixels[chosen], jnp.float32) / 127.5 - 1
        params, optimizer_state, value = step(params, optimizer_state, batch, labels[chosen])
        losses.append(float(value))
        if number % 100 == 0 or number == steps:
            seconds = time.perf_counter() - start
            print(f"step {number}: loss {np.mean(losses[-100:]):.3f} nats, {seconds:.0f} s", flush=True)
    _print_accuracy(graph, params)
    save(out, params, dtype=jnp.float16)
    print(f"{out}: {Path(out).stat().st_size / 1e3:.0f} kB")


def _make(rngs: nnx.Rngs) -> SceneClassifier:
    return SceneClassifier(len(LABELS), rngs=rngs)


def _draw(number: int, seed: int) -> Scene:
    return draw_scene(number, seed=seed, level=1 + number % 3, sizes=_SIZES)


def _render(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and labels of clips."""
    scenes = [_draw(number, seed) for number in range(count)]
    pixels = np.stack([make_scene_pixels(render(scene).clip) for scene in scenes])
    return pixels, np.stack([list_labels(scene) for scene in scenes])


def _print_accuracy(graph: Any, params: Any) -> None:
    """Print the share of right answers of each kind of label on scenes that were not trained on."""
    pixels, labels = _render(480, _TEST_SEED)
    model = nnx.merge(graph, params)
    classify = jax.jit(lambda batch: model.classify(model(batch / 127.5 - 1)))
    logits = np.concatenate([classify(jnp.asarray(part, jnp.float32)) for part in np.array_split(pixels, 15)])
    is_right, kinds = (logits > 0) == (labels > 0), [label.partition(":")[0] for label in LABELS]
    for kind in dict.fromkeys(kinds):
        columns = [column for column, each in enumerate(kinds) if each == kind]
        share, base = is_right[:, columns].mean(axis=(0, 1)), labels[:, columns].mean(axis=(0, 1))
        print(f"{kind}: {share:.1%} right ({max(base, 1 - base):.1%} by the most frequent answer)")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
