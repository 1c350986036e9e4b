"""VBench's image-based dimensions (arXiv 2311.17982): consistency of subject and background, and aesthetic quality.

They are computed as its code does (`subject_consistency.py`, `background_consistency.py`, `aesthetic_quality.py` and
`utils.py` of Vchitect/VBench), with the same networks, so that values of samples of its prompts compare with its
tables, whose means are over frames: the clips have one length. Their names begin with `vbench_`. Those of its
dimensions that need other networks (AMT, RAFT, MUSIQ, UMT, GRiT, Tag2Text, ViCLIP) are not here.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError
from dit_video.core.resize import compute_short_side_size, make_bicubic_matrix
from dit_video.core.typing import AnyArray
from dit_video.evaluation.feature_functions import FeatureFunction, OpenFeatures, make_identity
from dit_video.evaluation.metrics.frames import SubjectConsistency
from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.models.features.clip import ClipImageProcessor
from dit_video.models.features.convolutional import resize_frames
from dit_video.models.features.dino import DinoConfig
from dit_video.nn import get_graph_def
from dit_video.video import Clip
from dit_video.weights import load_clip_vision
from dit_video.weights.feature_networks import load_aesthetic_predictor, load_dino

_BATCH = 16
_DINO_MEAN, _DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COMPARABLE = "compares with VBench's tables for samples of its prompts"
_Frames = Float[Array, "B H W 3"]


def extract_by_frame(
    apply: Callable[[Any, AnyArray], Array], params: Any, clips: Sequence[Clip]
) -> Float32[np.ndarray, "n d"]:
    """Return features of all frames, in batches of one size for each size of frames.

    Args:
      apply: Function of parameters and frames in 0..255 to features, which is compiled.
      params: Its first argument.
      clips: The clips.
    """
    rows = []
    for clip in clips:
        for start in range(0, len(clip.frames), _BATCH):
            part = clip.frames[start : start + _BATCH]
            missing = np.zeros((_BATCH - len(part), *part.shape[1:]), np.uint8)
            rows.append(np.asarray(apply(params, np.concatenate([part, missing])))[: len(part)])
    return np.concatenate(rows)


def normalize_pixels(frames: _Frames, mean: Sequence[float], std: Sequence[float]) -> _Frames:
    """Return `(frames / 255 - mean) / std`."""
    return (frames / 255 - jnp.asarray(mean)) / jnp.asarray(std)


@dataclass(frozen=True, kw_only=True)
class DinoFeatures(FeatureFunction):
    """The class token of DINO ViT-B/16 for every frame, whose shorter side is resized to 224 pixels."""

    weights: str = "weights/dino.safetensors"
    """File of weights; see `dit_video.weights.feature_networks.load_dino`."""

    def load(self) -> OpenFeatures:
        """Read the weights."""
        return open_dino(DinoConfig(), load_dino(self.weights), make_identity("DINO", self.weights))


def open_dino(config: DinoConfig, params: Any, identity: str) -> OpenFeatures:
    """Return the function of a transformer of any size."""
    graph = get_graph_def(config.make)

    @jax.jit
    def apply(params: Any, frames: Array) -> Array:
        height, width = compute_short_side_size(frames.shape[1], frames.shape[2], config.side)
        resized = resize_frames(frames.astype(jnp.float32), height=height, width=width)
        return nnx.merge(graph, params)(normalize_pixels(resized, _DINO_MEAN, _DINO_STD))

    return OpenFeatures(functools.partial(extract_by_frame, apply, params), identity, is_of_frames=True)


@dataclass(frozen=True, kw_only=True)
class VbenchClipEmbeddings(FeatureFunction):
    """CLIP's projected embeddings of frames, of length 1, with VBench's resizing: bicubic, without antialiasing."""

    folder: str = "weights/clip"
    """Folder of a `transformers` `CLIPModel`: ViT-B/32 for the background, ViT-L/14 for the aesthetic score."""

    def load(self) -> OpenFeatures:
        """Read the vision tower.

        Raises:
          UserError: If it has no projection.
        """
        tower, processor = load_clip_vision(self.folder), ClipImageProcessor()
        if tower.config.projection is None:
            raise UserError(f"folder={self.folder} is invalid: its vision tower has no projection. Use a CLIPModel")
        graph, side = get_graph_def(tower.config.make), tower.config.size

        @jax.jit
        def apply(params: Any, frames: Array) -> Array:
            images = crop_bicubic(frames.astype(jnp.float32), side)
            features = nnx.merge(graph, params)(normalize_pixels(images, processor.mean, processor.std)).projected
            return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

        extract = functools.partial(extract_by_frame, apply, tower.params)
        return OpenFeatures(extract, f"CLIP of VBench {tower.digest[:12]}", is_of_frames=True)


def crop_bicubic(frames: _Frames, side: int) -> Float[Array, "B {side} {side} 3"]:
    """Return the centres of frames whose shorter side is resized to `side`, as VBench's `clip_transform` does."""
    height, width = compute_short_side_size(frames.shape[1], frames.shape[2], side)
    rows, columns = make_bicubic_matrix(frames.shape[1], height), make_bicubic_matrix(frames.shape[2], width)
    resized = jnp.einsum("gh,bhwc->bgwc", rows, jnp.einsum("vw,bhwc->bhvc", columns, frames))
    top, left = (round((length - side) / 2) for length in (height, width))
    return resized[:, top : top + side, left : left + side]


def _describe_consistency(part: str, network: str) -> MetricDescription:
    """Return the description of the consistency of a part of the picture, by a network's features."""
    return MetricDescription(
        label=f"{part} consistency (VBench)",
        is_higher_better=True,
        explanation=f"likeness of frames to the first and the previous one by {network}; {_COMPARABLE}",
    )


@dataclass(frozen=True, kw_only=True)
class VbenchSubjectConsistency(SubjectConsistency):
    """Likeness of a sample's frames by DINO's features: VBench's subject consistency."""

    features: FeatureFunction = DinoFeatures()
    name = "vbench_subject_consistency"
    description = _describe_consistency("subject", "DINO")


@dataclass(frozen=True, kw_only=True)
class VbenchBackgroundConsistency(SubjectConsistency):
    """Likeness of a sample's frames by CLIP's embeddings: VBench's background consistency, with ViT-B/32."""

    features: FeatureFunction = VbenchClipEmbeddings()
    name = "vbench_background_consistency"
    description = _describe_consistency("background", "CLIP")


_open_predictor = functools.cache(load_aesthetic_predictor)


@dataclass(frozen=True, kw_only=True)
class AestheticQuality(MeanMetric):
    """Mean of LAION's aesthetic score of frames, a tenth of it, so that it is mostly in 0..1."""

    features: FeatureFunction = VbenchClipEmbeddings(folder="weights/clip_l14")
    """Embeddings of length 1 by CLIP ViT-L/14."""
    weights: str = "weights/aesthetic.safetensors"
    """File of the linear map; see `dit_video.weights.feature_networks.load_aesthetic_predictor`."""

    needs, name = ("samples",), "vbench_aesthetic_quality"
    description = MetricDescription(
        label="aesthetic quality (VBench)",
        is_higher_better=True,
        explanation=f"LAION's score of frames / 10; {_COMPARABLE}",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the mean score of every sample's frames."""
        kernel, bias = _open_predictor(self.weights)
        rows = self.features.open().extract_by_clip(batch.samples)
        return [float((each @ kernel + bias).mean(axis=(0, 1)) / 10) for each in rows]

    def make_note(self, state: tuple[float | None, ...]) -> str:
        """Return the identity of the networks."""
        identities = (self.features.open().identity, make_identity("aesthetic predictor", self.weights))
        return ", ".join(identities) if state else ""


VBENCH_METRICS = (VbenchSubjectConsistency(), VbenchBackgroundConsistency(), AestheticQuality())
"""Metrics whose values compare with VBench's tables, for samples of its prompts and with the published networks."""
