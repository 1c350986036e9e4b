"""Features of a small classifier of rendered scenes, whose weights are part of the package."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.evaluation.feature_functions import (
    FeatureFunction,
    NetworkInput,
    OpenFeatures,
    make_extractor,
    make_identity,
)
from dit_video.nn import Linear
from dit_video.scenes import Scene
from dit_video.scenes.physics import simulate
from dit_video.scenes.scene import (
    BACKGROUNDS,
    CAMERA_MOTIONS,
    COLOURS,
    DIRECTIONS,
    FIGURE_ACTIONS,
    RADII,
    SHAPES,
    SPEEDS,
    TEXTURES,
)
from dit_video.video import Clip
from dit_video.weights import load

SIDE = 48
"""Height and width of the classifier's clips in pixels."""
PATCH = 4
WIDTHS = (32, 48, 64, 96)
"""Channels of the embedding of patches and of the convolutions."""
_STRIDES = ((2, 2, 2), (2, 1, 1), (2, 2, 2))
SCENE_WEIGHTS = Path(__file__).with_name("features.safetensors")
"""Weights that `tools/train_scene_classifier.py` makes."""
_MOVES = (*DIRECTIONS, "still")
LABELS: tuple[str, ...] = (
    *(f"background:{name}" for name in BACKGROUNDS),
    *(f"colour:{name}" for name in COLOURS),
    *(f"shape:{name}" for name in SHAPES),
    *(f"texture:{name}" for name in TEXTURES),
    *(f"size:{name}" for name in RADII),
    *(f"direction:{colour} {move}" for colour in COLOURS for move in _MOVES),
    *(f"speed:{name}" for name in SPEEDS),
    *(f"number:{count}" for count in (1, 2, 3)),
    *(f"contact:{kind}" for kind in ("bounce", "collision")),
    *(f"figure:{action}" for action in FIGURE_ACTIONS),
    *(f"camera:{motion}" for motion in CAMERA_MOTIONS),
    "gravity:fall",
    "occluder:post",
)
"""Labels that the classifier recognises, as `kind:value`; several of a kind may be true."""


@dataclass(frozen=True, kw_only=True)
class SceneFeatures(FeatureFunction):
    """The 96 features of the classifier of rendered scenes; they know colours, shapes and motion of these scenes only.

    Clips of any number of frames are resized to 48×48 pixels.
    """

    weights: str = ""
    """File of the classifier's weights; those of the package if empty."""

    def load(self) -> OpenFeatures:
        """Read the weights.

        Raises:
          MissingError: If the file does not exist.
        """
        path = self.weights or SCENE_WEIGHTS
        params = load(path)
        extract = make_extractor(
            lambda rngs: SceneClassifier(len(LABELS), rngs=rngs), params, NetworkInput(side=SIDE), batch=16
        )
        return OpenFeatures(extract, make_identity("scene classifier", path))


def list_labels(scene: Scene) -> Float32[np.ndarray, " L"]:
    """Return 1 for the labels that are true of a scene, and 0 for the others."""
    labels = {f"background:{scene.background}", f"number:{len(scene.objects)}"}
    for each in scene.objects:
        labels |= {
            f"colour:{each.colour}",
            f"shape:{each.shape}",
            f"texture:{each.texture}",
            f"size:{each.size}",
            f"speed:{each.speed}",
        }
        if each.direction is not None or not any(each.velocity):
            labels.add(f"direction:{each.colour} {each.direction or 'still'}")
    labels |= {f"contact:{event.kind}" for event in simulate(scene).events}
    if scene.figure is not None:
        labels.add(f"figure:{scene.figure.action}")
    if scene.camera.caption is not None:
        labels.add(f"camera:{scene.camera.caption}")
    if scene.gravity:
        labels.add("gravity:fall")
    if scene.occluder is not None:
        labels.add("occluder:post")
    return np.array([label in labels for label in LABELS], np.float32)


def make_scene_pixels(clip: Clip) -> UInt8[np.ndarray, "T h w 3"]:
    """Return the frames of a clip at the classifier's size."""
    return NetworkInput(side=SIDE).resize(clip.frames)


class SceneClassifier(nnx.Module):
    """Convolutions over patches of frames, whose mean over all positions is the feature, and one logit for each label.

    Args:
      labels: Number of labels.
      widths: Channels of the embedding of patches and of the convolutions.
      rngs: Random keys of the initial parameters.
    """

    def __init__(self, labels: int, *, widths: Sequence[int] = WIDTHS, rngs: nnx.Rngs):
        self.embedding = Linear(3 * PATCH**2, widths[0], rngs=rngs)
        self.convolutions = nnx.List(
            [Linear(27 * width_in, width, rngs=rngs) for width_in, width in itertools.pairwise(widths)]
        )
        self.head = Linear(widths[-1], labels, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B T H W 3"]) -> Float[Array, "B D"]:
        """Return the features of clips of 48×48 pixels in [-1, 1], of any number of frames.

        Raises:
          UserError: If clips have another size.
        """
        if pixels.shape[2:4] != (SIDE, SIDE):
            height, width = pixels.shape[2:4]
            raise UserError(f"frames of {height}x{width} are invalid: the classifier reads {SIDE}x{SIDE}. Resize them")
        patches = einops.rearrange(pixels, "B T (h p) (w q) c -> B T h w (p q c)", p=PATCH, q=PATCH)
        x = jax.nn.gelu(self.embedding(patches))
        for convolution, stride in zip(self.convolutions, _STRIDES, strict=True):
            x = jax.nn.gelu(convolution(_stack_neighbours(x, stride)))
        return jnp.mean(x, axis=(1, 2, 3))

    def classify(self, features: Float[Array, "B D"]) -> Float[Array, "B L"]:
        """Return the logits of the labels, each of which may be true."""
        return self.head(features)


def _stack_neighbours(x: Float[Array, "B t h w i"], stride: tuple[int, int, int]) -> Float[Array, "B _ _ _ o"]:
    """Return the values at the 3×3×3 positions around every one, zero outside.

    A matrix product of them is a convolution, whose gradient XLA computes ten times faster so on CPU.
    """
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    frames, height, width = x.shape[1:4]
    shifts = itertools.product(range(3), repeat=3)
    t, h, w = stride
    return jnp.concatenate(
        [padded[:, a : a + frames : t, b : b + height : h, c : c + width : w] for a, b, c in shifts], axis=-1
    )


def compute_label_loss(logits: Float[Array, "B L"], labels: Float[Array, "B L"]) -> Float[Array, " B"]:
    """Return the binary cross-entropy of each clip's labels, in nats, summed over them."""
    return (jax.nn.softplus(logits) - labels * logits).sum(axis=-1)
