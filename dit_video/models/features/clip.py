"""CLIP: towers of images and texts (Radford et al., arXiv 2103.00020)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from PIL import Image

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.offload import move_to_devices
from dit_video.core.resize import compute_short_side_size
from dit_video.nn import LayerNorm, Linear, apply_stack, get_graph_def, make_stack

Activation = Literal["quick_gelu", "gelu"]
"""Activation of the MLPs: `x sigmoid(1.702 x)` in OpenAI's models, exact gelu (error function) in OpenCLIP's."""
ACTIVATIONS: tuple[Activation, ...] = ("quick_gelu", "gelu")
_DTYPES = ("float32", "bfloat16")
# Not -inf: the softmax of a fully masked row would be NaN.
_MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class ClipTowerConfig:
    """Configuration common to both towers.

    Raises:
      UserError: If a size is below 1, the heads do not divide the width, or the dtype is not supported.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    eps: float = 1e-5
    """Epsilon of layer norms."""
    projection: int | None = None
    """Width of the space in which texts and images are compared; None for a tower without a map to it."""
    dtype: str = "float32"
    """Dtype of matrix products, float32 or bfloat16; norms, softmax and the residual stream are float32."""

    def __post_init__(self):
        check_at_least(1, width=self.width, layers=self.layers, heads=self.heads)
        check_at_least(1, mlp_width=self.mlp_width, projection=self.projection)
        if self.width % self.heads:
            raise UserError(f"width={self.width} is invalid: must be divisible by heads={self.heads}. Change one")
        if self.dtype not in _DTYPES:
            raise UserError(f"dtype={self.dtype!r} of a CLIP tower is invalid: use {' or '.join(_DTYPES)}")


class LayerStates(NamedTuple):
    """Values passed from layer to layer: the hidden states, and those before the last layer."""

    hidden: Float[Array, "B S E"]
    penultimate: Float[Array, "B S E"]
    """Input of the last layer: the penultimate hidden states."""


class ClipFeatures(NamedTuple):
    """Features of texts or images from their tower; an image's first token is the class token, for the whole image."""

    values: Float[Array, "B S E"]
    """Features of every token: of texts after the last norm, of images without a norm."""
    penultimate: Float[Array, "B S E"]
    """Penultimate hidden states, the input of the last layer: the image tokens of Wan's image-to-video."""
    pooled: Float[Array, "B E"]
    """Element of `values` at a text's end token, or at an image's first token after a norm."""
    projected: Float[Array, "B P"] | None
    """Projection of `pooled` to the space shared by both towers; None for a tower without a map to it."""


class ClipLayer(nnx.Module):
    """A pre-norm transformer layer with biases: `x += attention(norm(x))`, `x += mlp(norm(x))`."""

    def __init__(self, config: ClipTowerConfig, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.width
        self.heads, self.activation = config.heads, config.activation
        self.norm_attention = LayerNorm(width, eps=config.eps)
        self.query, self.key, self.value = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(3))
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm_mlp = LayerNorm(width, eps=config.eps)
        self.up = Linear(width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.down = Linear(config.mlp_width, width, dtype=dtype, rngs=rngs)

    def __call__(self, states: LayerStates, mask: Bool[Array, "B S S"] | None) -> LayerStates:
        """Apply the layer; `mask` is true for the keys that each query sees, None if it sees all."""
        x = states.hidden
        y = self.norm_attention(x)
        q, k, v = (linear(y).reshape(*x.shape[:2], self.heads, -1) for linear in (self.query, self.key, self.value))
        attended = x + self.out(_attend(q, k, v, mask=mask).reshape(x.shape))
        x_up = self.up(self.norm_mlp(attended))
        quick = self.activation == "quick_gelu"
        hidden = x_up * jax.nn.sigmoid(1.702 * x_up) if quick else jax.nn.gelu(x_up, approximate=False)
        return LayerStates(hidden=attended + self.down(hidden), penultimate=x)


def make_projection(config: ClipTowerConfig, *, rngs: nnx.Rngs) -> Linear | None:
    """Return the map into the space that both towers share, or None for a tower without one."""
    if config.projection is None:
        return None
    return Linear(config.width, config.projection, bias=False, dtype=jnp.dtype(config.dtype), rngs=rngs)


_Heads = Float[Array, "B S K d"]


def _attend(q: _Heads, k: _Heads, v: _Heads, *, mask: Bool[Array, "B S S"] | None) -> _Heads:
    """Return `softmax(q k^T / sqrt(d)) v`, with the softmax in float32.

    Not `nn.Attention`, which is for the patterns of videos: a text is a few dozen tokens, an image a few hundred.
    """
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, _MASKED)
    return jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


@dataclass(frozen=True, kw_only=True)
class ClipImageProcessor:
    """Options of `transformers`' `CLIPImageProcessor`; `weights.load_clip_images` reads them from a folder.

    Raises:
      UserError: If a size is below 1, or a standard deviation is not above zero.
    """

    resize: int | tuple[int, int] | None = 224
    """Pixels of the shorter side, with the aspect ratio kept; or height and width; None does not resize."""
    crop: tuple[int, int] | None = (224, 224)
    """Height and width of the centre crop; None does not crop."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue in [0, 1]."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue in [0, 1]."""

    def __post_init__(self):
        sizes = (*(self.resize if isinstance(self.resize, tuple) else (self.resize,)), *(self.crop or ()))
        if any(size is not None and size < 1 for size in sizes):
            raise UserError(f"resize={self.resize}, crop={self.crop} is invalid: use sizes of at least 1")
        if min(self.std) <= 0:
            raise UserError(f"std={self.std} is invalid: use values above 0")

    def compute_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that frames of this size are resized to."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        return compute_short_side_size(height, width, self.resize)


def preprocess_frames(
    frames: UInt8[np.ndarray, "T H W 3"], processor: ClipImageProcessor
) -> Float32[np.ndarray, "T h w 3"]:
    """Return `(cropped / 255 - mean) / std` of the resized frames.

    Raises:
      UserError: If the frames are smaller than the crop.
    """
    resized = resize_bicubic(frames, *processor.compute_size(*frames.shape[1:3]))
    if processor.crop is not None:
        resized = _crop_centre(resized, *processor.crop)
    mean, std = np.asarray(processor.mean, np.float32), np.asarray(processor.std, np.float32)
    return (resized.astype(np.float32) / np.float32(255) - mean) / std


def resize_bicubic(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    """Resize frames by Pillow's antialiased bicubic filter, as in CLIP's training and `transformers`."""
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(picture) for picture in resized])


def _crop_centre(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    frame_height, frame_width = frames.shape[1:3]
    if frame_height < height or frame_width < width:
        raise UserError(
            f"crop={height}x{width} is invalid for frames that are resized to {frame_height}x{frame_width}: use a "
            "larger resize or a smaller crop"
        )
    top, left = (frame_height - height) // 2, (frame_width - width) // 2
    return frames[:, top : top + height, left : left + width]


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(ClipTowerConfig):
    """Configuration of a vision tower; `weights.load_clip_vision` reads one from a folder.

    Raises:
      UserError: If patches do not divide the image.
    """

    size: int = 224
    """Pixels per side of an image."""
    patch: int = 32
    """Pixels per side of a patch."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, size=self.size, patch=self.patch)
        if self.size % self.patch:
            raise UserError(f"size={self.size} is invalid: must be divisible by patch={self.patch}. Change one")

    @property
    def tokens(self) -> int:
        """Return the tokens of an image: the class token, and one per patch."""
        return 1 + (self.size // self.patch) ** 2

    def make(self, rngs: nnx.Rngs) -> "ClipVision":
        return ClipVision(self, rngs=rngs)


class ClipVision(nnx.Module):
    """A vision tower from images of one size to features; `preprocess_frames` turns frames into such images."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs):
        width, patch = config.width, config.patch
        self.config = config
        shape = (patch, patch, 3, width)
        self.patch_kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.whole = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (width,)))
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.tokens, width)))
        self.norm_in = LayerNorm(width, eps=config.eps)
        self.blocks = make_stack(lambda r: ClipLayer(config, rngs=r), config.layers, rngs=rngs)
        self.norm_pooled = LayerNorm(width, eps=config.eps)
        self.projection = make_projection(config, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> ClipFeatures:
        """Return the features of images that were preprocessed as in the tower's training.

        Raises:
          UserError: If the images have another size than the tower's.
        """
        size, patch = self.config.size, self.config.patch
        if images.shape[1:3] != (size, size):
            raise UserError(
                f"images of {images.shape[1]}x{images.shape[2]} are invalid: CLIP's vision tower reads {size}x{size}. "
                "Prepare them with ClipImageProcessor"
            )
        dtype = jnp.dtype(self.config.dtype)
        patches = rearrange(images.astype(dtype), "B (h p) (w q) C -> B (h w) (p q C)", p=patch, q=patch)
        patches = patches @ self.patch_kernel[...].astype(dtype).reshape(-1, self.config.width)
        class_token = jnp.broadcast_to(self.whole[...], (len(images), 1, self.config.width))
        x = self.norm_in(jnp.concatenate([class_token, patches.astype(jnp.float32)], axis=1) + self.position[...])
        states = apply_stack(self.blocks, LayerStates(hidden=x, penultimate=x), None)
        pooled = self.norm_pooled(states.hidden[:, 0])
        projected = None if self.projection is None else self.projection(pooled)
        return ClipFeatures(states.hidden, states.penultimate, pooled, projected)


_LEGACY_END_TOKEN = 2


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig(ClipTowerConfig):
    """Configuration of a text tower; `weights.load_clip_text` reads one from a folder."""

    vocabulary: int = 49408
    positions: int = 77
    """Maximum number of tokens of a text, including its start and end token."""
    end_token: int = 49407
    """Id of the token that is pooled. Folders from before July 2023 wrongly say 2; it then means a text's largest id,
    which is the end token's in their vocabularies."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, vocabulary=self.vocabulary, positions=self.positions)

    def make(self, rngs: nnx.Rngs) -> "ClipText":
        return ClipText(self, rngs=rngs)


class ClipText(nnx.Module):
    """A text tower from token ids to features, one text per row; each token sees itself and those before it."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocabulary, config.width)))
        self.position = nnx.Param(0.01 * jax.random.normal(rngs.params(), (config.positions, config.width)))
        self.blocks = make_stack(lambda r: ClipLayer(config, rngs=r), config.layers, rngs=rngs)
        self.norm = LayerNorm(config.width, eps=config.eps)
        self.projection = make_projection(config, rngs=rngs)

    def __call__(self, ids: Int[Array, "B S"], mask: Int[Array, "B S"]) -> ClipFeatures:
        """Return features of texts; `mask` is 0 at padding, which no token sees. Each row holds one text.

        Raises:
          UserError: If rows have more tokens than the config's `positions`.
        """
        length = ids.shape[1]
        if length > self.config.positions:
            raise UserError(f"a text of {length} tokens is too long: CLIP reads up to {self.config.positions}. Cut it")
        x = self.embedding[...][ids].astype(jnp.float32) + self.position[...][:length]
        visible = jnp.tril(jnp.ones((length, length), bool)) & (mask != 0)[:, None, :]
        states = apply_stack(self.blocks, LayerStates(hidden=x, penultimate=x), visible)
        values = self.norm(states.hidden)
        # Texts may be padded with more end tokens; the first one is the end.
        is_legacy = self.config.end_token == _LEGACY_END_TOKEN
        end = jnp.argmax(ids if is_legacy else ids == self.config.end_token, axis=1)
        pooled = jnp.take_along_axis(values, end[:, None, None], axis=1)[:, 0]
        projected = None if self.projection is None else self.projection(pooled)
        return ClipFeatures(values, states.penultimate, pooled, projected)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Configuration of both towers; `weights.load_clip` reads it from a folder.

    Raises:
      UserError: If the towers do not project into one space.
    """

    text: ClipTextConfig
    vision: ClipVisionConfig

    def __post_init__(self):
        if self.text.projection is None or self.text.projection != self.vision.projection:
            raise UserError(
                f"text.projection={self.text.projection}, vision.projection={self.vision.projection} is invalid: both "
                "towers project into one space. Give both the same projection"
            )

    def make(self, rngs: nnx.Rngs) -> "ClipTowers":
        return ClipTowers(self, rngs=rngs)


class ClipTowers(nnx.Module):
    """A CLIP model: the towers `text` and `vision`, and the scale of their similarity."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text, self.vision = config.text.make(rngs), config.vision.make(rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

    def similarity(self, texts: Float[Array, "A P"], images: Float[Array, "B P"]) -> Float[Array, "A B"]:
        """Return `exp(logit_scale) cos(text, image)` for every pair of projected texts and images.

        Its softmax over texts is the probability of each text as the image's caption.
        """
        return jnp.exp(self.logit_scale[...]) * l2_normalize(texts) @ l2_normalize(images).T


def l2_normalize(x: Float[Array, "*batch P"]) -> Float[Array, "*batch P"]:
    """Return `x / |x|` in float32, so that products of such vectors are cosines."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


FeatureName = Literal["values", "penultimate", "pooled", "projected"]
"""Name of a field of `ClipFeatures`."""


def make_frame_program(config: ClipVisionConfig, feature: FeatureName) -> Callable[..., Any]:
    """Return the jitted function from parameters and preprocessed images `B h w 3` to one feature of each image."""
    graph = get_graph_def(config.make)
    return jax.jit(lambda params, images: getattr(nnx.merge(graph, params)(images), feature))


class FrameEncoder:
    """A function `encode(frames)` that returns one feature of each frame. Threads may share it."""

    def __init__(
        self,
        config: ClipVisionConfig,
        params: Any,
        processor: ClipImageProcessor,
        *,
        feature: FeatureName = "projected",
        batch: int = 16,
    ):
        """Create an encoder; `weights.load_clip_vision` reads config and parameters.

        Args:
          config: Configuration of the tower.
          params: Its parameters, a nested dictionary; those in host memory are copied to the device for each call.
          processor: Preprocessing of frames.
          feature: Field of `ClipFeatures` to return; Wan's image-to-video uses `penultimate`.
          batch: Frames per batch.

        Raises:
          UserError: If the tower lacks the projection, images have another size than it reads, or the batch is empty.
        """
        if feature == "projected" and config.projection is None:
            raise UserError("feature='projected' is invalid: this tower has no projection. Use 'pooled'")
        if processor.crop not in (None, (config.size, config.size)):
            raise UserError(f"crop={processor.crop} is invalid: use the tower's {config.size}x{config.size}")
        check_at_least(1, batch=batch)
        self._params, self._processor, self._batch = params, processor, batch
        self._encode = make_frame_program(config, feature)

    def __call__(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T *part"]:
        """Return the feature of each frame: a vector, or one vector per token.

        Raises:
          UserError: If there are no frames, or the preprocessing does not bring them to the tower's size.
        """
        if not len(frames):
            raise UserError("frames are empty: there is nothing to encode. Use at least one frame")
        batches = [frames[start : start + self._batch] for start in range(0, len(frames), self._batch)]
        with move_to_devices(self._params) as params:
            return np.concatenate([self._encode_batch(params, batch) for batch in batches])

    def _encode_batch(self, params: Any, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T *part"]:
        images = preprocess_frames(frames, self._processor)
        # Padded for the computation only: one image and a full batch are two programs for clips of any length.
        missing = 0 if len(images) == 1 else self._batch - len(images)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        return np.asarray(self._encode(params, images), np.float32)[: len(frames)]
