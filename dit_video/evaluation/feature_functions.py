"""Functions from clips to features, by networks whose weights are files."""

import abc
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.models.encoders import PretrainedTokenizer
from dit_video.models.features import FrameEncoder
from dit_video.models.features.convolutional import (
    C3D_SIZE,
    I3D_MIN_FRAMES,
    I3D_SIDE,
    INCEPTION_SIDE,
    C3d,
    I3d,
    InceptionV3,
    resize_frames,
)
from dit_video.models.features.video_mae import VideoMaeConfig
from dit_video.nn import get_graph_def
from dit_video.video import Clip
from dit_video.weights import load_clip_image_processor, load_clip_text, load_clip_vision
from dit_video.weights.feature_networks import load_c3d, load_i3d, load_inception, load_video_mae
from dit_video.weights.text_encoders import find_tokenizer_folder


class OpenFeatures(NamedTuple):
    """A function of clips with its weights in memory."""

    extract: Callable[[Sequence[Clip]], Float32[np.ndarray, "n d"]]
    """Returns a row of features for each clip, or for each frame if `is_of_frames`."""
    identity: str
    """Name of the function, and hash of its weights: values with different identities are not comparable."""
    is_of_frames: bool = False
    """True for one row per frame, clip after clip; False for one row per clip."""

    def extract_by_clip(self, clips: Sequence[Clip]) -> list[Float32[np.ndarray, "_ d"]]:
        """Return the rows of each clip.

        Raises:
          UserError: If the function returned another number of rows than `is_of_frames` says.
        """
        lengths = [len(clip.frames) if self.is_of_frames else 1 for clip in clips]
        rows = self.extract(clips)
        if len(rows) != sum(lengths):
            kind = "frames" if self.is_of_frames else "clips"
            rule = f"it returned {len(rows)} rows for {sum(lengths)} {kind}"
            raise UserError(f"features={self.identity} is invalid: {rule}. Use is_of_frames=True for a row a frame.")
        return np.split(rows, np.cumsum(lengths, axis=0)[:-1])


@dataclass(frozen=True, kw_only=True)
class FeatureFunction(abc.ABC):
    """Base of the configs of clip functions; a subclass names the weights, which `open` reads once."""

    @abc.abstractmethod
    def load(self) -> OpenFeatures:
        """Read the weights.

        Raises:
          MissingError: If a weight file does not exist.
          UserError: If the file holds another network.
        """

    def open(self) -> OpenFeatures:
        """Return the function; equal configs share one, so that its weights are read once.

        Raises:
          MissingError: If a weight file does not exist.
          UserError: If the file holds another network.
        """
        return _load(self)


@functools.cache
def _load(config: FeatureFunction) -> OpenFeatures:
    return config.load()


def make_identity(name: str, *files: str | Path) -> str:
    """Return the name of a function with the first 12 digits of its weight files' SHA-256."""
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{name} {digest.hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class NetworkInput:
    """Frames that a network reads: squares, resized bilinearly without antialiasing, as the references do.

    Clips keep their numbers of frames.
    """

    side: int
    """Height and width in pixels."""
    frames: int | None = None
    """Number of frames of every clip; None for any number."""
    min_frames: int = 1
    """Smallest number of frames of a clip."""
    has_aligned_corners: bool = False
    """True to map the centres of the corners' pixels to each other; False for the corners of the frame."""

    def check(self, clip: Clip) -> None:
        """Check that a clip has enough frames.

        Raises:
          UserError: If the clip has too few frames, or another number than the network reads.
        """
        count = len(clip.frames)
        if count < self.min_frames or self.frames not in (None, count):
            needed = f"at least {self.min_frames}" if self.frames is None else f"exactly {self.frames}"
            raise UserError(
                f"a clip of {count} frames is invalid: this network reads {needed}. Use clips of that length, or "
                "another metric"
            )

    def resize(self, frames: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "T h w 3"]:
        """Return frames at the network's size, rounded to whole values, as they are stored."""
        return np.round(self.interpolate(frames)).astype(np.uint8)

    def interpolate(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T h w 3"]:
        """Return frames at the network's size, in 0..255."""
        return np.asarray(_resize(frames, self.side, has_aligned_corners=self.has_aligned_corners))


def make_extractor(
    make: Callable[[nnx.Rngs], Any],
    params: Any,
    network_input: NetworkInput,
    *,
    batch: int,
    is_image: bool = False,
    output: Callable[[Any, Array], Array] | None = None,
) -> Callable[[Sequence[Clip]], Float32[np.ndarray, "n d"]]:
    """Return the function from clips to a network's features.

    Clips of the same length share one program, whose batches are padded to one size for the computation only. This
    process's devices share a batch.

    Args:
      make: Makes the network, whose call maps pixels in [-1, 1], `B T H W 3`, to features `B D`.
      params: Its parameters.
      network_input: Frames that it reads.
      batch: Examples of a batch; at least one for each device.
      is_image: True for a network of images `B H W 3`; then each frame of a clip is an example.
      output: Called with the network and its features, returns the features to use; by default the network's.
    """
    graph, devices = get_graph_def(make), Mesh(jax.local_devices(), ("examples",))
    sharding = NamedSharding(devices, PartitionSpec("examples"))
    batch = max(1, batch // devices.size) * devices.size

    @jax.jit
    def apply(params: Any, pixels: Array) -> Array:
        model = nnx.merge(graph, params)
        features = model(pixels / 127.5 - 1)
        return features if output is None else output(model, features)

    @functools.cache
    def put_params() -> Any:
        # Not before features are extracted: metrics are opened before training, which needs the memory.
        return jax.device_put(params, NamedSharding(devices, PartitionSpec()))

    def extract(clips: Sequence[Clip]) -> Float32[np.ndarray, "n d"]:
        for clip in clips:
            network_input.check(clip)
        features: dict[int, np.ndarray] = {}
        order = sorted(range(len(clips)), key=lambda index: len(clips[index].frames))
        for _, same in itertools.groupby(order, key=lambda index: len(clips[index].frames)):
            indices = list(same)
            for start in range(0, len(indices), batch):
                part = indices[start : start + batch]
                pixels = np.stack([network_input.interpolate(clips[index].frames) for index in part])
                features |= zip(part, _extract_batch(pixels), strict=True)
        return np.concatenate([features[index] for index in range(len(clips))])

    def _extract_batch(pixels: Float32[np.ndarray, "b T H W 3"]) -> list[Float32[np.ndarray, "_ d"]]:
        """Return the rows of each clip."""
        examples = pixels.reshape(-1, *pixels.shape[2:]) if is_image else pixels
        rows = []
        for start in range(0, len(examples), batch):
            part: np.ndarray = examples[start : start + batch]
            missing = np.zeros((batch - len(part), *part.shape[1:]), np.float32)
            examples_on_devices = jax.device_put(np.concatenate([part, missing]), sharding)
            rows.append(np.asarray(apply(put_params(), examples_on_devices))[: len(part)])
        return np.array_split(np.concatenate(rows), len(pixels))

    return extract


@jax.jit(static_argnames=("side", "has_aligned_corners"))
def _resize(frames: Array, side: int, *, has_aligned_corners: bool) -> Array:
    pixels = frames.astype(jnp.float32)
    return resize_frames(pixels, height=side, width=side, has_aligned_corners=has_aligned_corners)


@dataclass(frozen=True, kw_only=True)
class InceptionFeatures(FeatureFunction):
    """The 2048 pooled features of Inception-v3 for every frame, in FID's variant (arXiv 1706.08500).

    Frames are resized to 299×299 pixels.
    """

    weights: str = "weights/inception.safetensors"
    """File of weights; see `dit_video.weights.feature_networks.load_inception`."""
    logits: bool = False
    """True for the 1008 logits of the inception score instead."""

    def load(self) -> OpenFeatures:
        """Read the weights."""
        extract = make_extractor(
            lambda rngs: InceptionV3(rngs=rngs),
            load_inception(self.weights),
            NetworkInput(side=INCEPTION_SIDE),
            batch=16,
            is_image=True,
            output=InceptionV3.classify if self.logits else None,
        )
        name = "Inception-v3 logits" if self.logits else "Inception-v3"
        return OpenFeatures(extract, make_identity(name, self.weights), is_of_frames=True)


@dataclass(frozen=True, kw_only=True)
class I3dFeatures(FeatureFunction):
    """The 400 logits of I3D, trained on Kinetics-400, as FVD is computed with pytorch-i3d (arXiv 1812.01717).

    Clips of at least 9 frames are resized to 224×224 pixels.
    """

    weights: str = "weights/i3d.safetensors"
    """File of weights; see `dit_video.weights.feature_networks.load_i3d`."""

    def load(self) -> OpenFeatures:
        """Read the weights."""
        network_input = NetworkInput(side=I3D_SIDE, min_frames=I3D_MIN_FRAMES)
        extract = make_extractor(lambda rngs: I3d(rngs=rngs), load_i3d(self.weights), network_input, batch=4)
        return OpenFeatures(extract, make_identity("I3D", self.weights))


@dataclass(frozen=True, kw_only=True)
class C3dLogits(FeatureFunction):
    """The 101 logits of C3D, fine-tuned on UCF-101, as TGAN's authors compute the score (arXiv 1611.06624).

    Clips of 16 frames are resized to 112×112 pixels with aligned corners, as Chainer does.
    """

    weights: str = "weights/conv3d_deepnetA_ucf.npz"
    """File of weights; see `dit_video.weights.feature_networks.load_c3d`."""
    mean: str = "weights/mean2.npz"
    """File of the mean clip."""

    def load(self) -> OpenFeatures:
        """Read the weights."""
        params = load_c3d(self.weights, mean=self.mean)
        network_input = NetworkInput(side=C3D_SIZE.h, frames=C3D_SIZE.t, has_aligned_corners=True)
        extract = make_extractor(lambda rngs: C3d(rngs=rngs), params, network_input, batch=4)
        return OpenFeatures(extract, make_identity("C3D", self.weights, self.mean))


@dataclass(frozen=True, kw_only=True)
class VideoMaeFeatures(FeatureFunction):
    """The 1408 features of VideoMAE v2's ViT-g, which depend more on motion than I3D's do (arXiv 2404.12391).

    Clips of an even number of frames are resized to 224×224 pixels.
    """

    weights: str = "weights/video_mae.safetensors"
    """File of weights; see `dit_video.weights.feature_networks.load_video_mae`."""

    def load(self) -> OpenFeatures:
        """Read the weights."""
        config = VideoMaeConfig()
        network_input = NetworkInput(side=config.side, min_frames=config.patch_frames)
        extract = make_extractor(config.make, load_video_mae(self.weights), network_input, batch=2)
        return OpenFeatures(extract, make_identity("VideoMAE", self.weights))


EmbedTexts = Callable[[Sequence[str]], Float32[np.ndarray, "n P"]]
_TEXTS = 16
"""Number of texts that are embedded at once."""


@dataclass(frozen=True, kw_only=True)
class ClipEmbeddings(FeatureFunction):
    """CLIP's projected embeddings, of length 1: one per frame (arXiv 2103.00020)."""

    folder: str = "weights/clip"
    """Folder of a `transformers` `CLIPModel` with its tokenizer and image settings, such as
    `openai/clip-vit-base-patch32`."""

    def load(self) -> OpenFeatures:
        """Read the vision tower."""
        tower = load_clip_vision(self.folder)
        encode = FrameEncoder(tower.config, tower.params, load_clip_image_processor(self.folder))

        def extract(clips: Sequence[Clip]) -> Float32[np.ndarray, "n d"]:
            return _normalize(np.concatenate([encode(clip.frames) for clip in clips]))

        return OpenFeatures(extract, f"CLIP {tower.digest[:12]}", is_of_frames=True)

    def open_texts(self) -> EmbedTexts:
        """Return the function from texts to embeddings of length 1.

        Raises:
          MissingError: If the folder lacks the text tower or the tokenizer.
          UserError: If the text tower has no projection.
        """
        return _load_texts(self)


@functools.cache
def _load_texts(config: ClipEmbeddings) -> EmbedTexts:
    tower = load_clip_text(config.folder)
    if tower.config.projection is None:
        raise UserError(f"folder={config.folder} is invalid: its text tower has no projection. Use a CLIPModel")
    positions = tower.config.positions
    tokenize = PretrainedTokenizer(find_tokenizer_folder(Path(config.folder)), max_tokens=positions)
    graph = get_graph_def(tower.config.make)
    encode = jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask).projected)

    def embed(texts: Sequence[str]) -> Float32[np.ndarray, "n P"]:
        rows = []
        for start in range(0, len(texts), _TEXTS):
            part = [tokenize(text) for text in texts[start : start + _TEXTS]]
            ids, mask = np.zeros((2, _TEXTS, positions), np.int32)
            for row, tokens in enumerate(part):
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            rows.append(np.asarray(encode(tower.params, ids, mask), np.float32)[: len(part)])
        return _normalize(np.concatenate(rows))

    return embed


def _normalize(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
