"""Scores of clips by CLIP: embeddings, matches of captions, and aesthetics by heads of other projects.

Known heads are LAION's linear ones (`sa_0_4_vit_l_14_linear.pth` and alike), its improved predictors
(`sac+logos+ava1-l14-linearMSE.pth`, `ava+logos-l14-linearMSE.pth`, and `ava+logos-l14-reluMSE.pth`), and their copies
in models of `transformers`, which also hold the vision tower. Files may be safetensors or those of PyTorch.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pyarrow as pa
from flax import nnx
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.core.resize import resize
from dit_video.curation.annotator import Annotator, ClipFile, Column
from dit_video.models.encoders import PretrainedTokenizer
from dit_video.models.features import FrameEncoder
from dit_video.nn import get_graph_def
from dit_video.weights import load, load_clip_image_processor, load_clip_text, load_clip_vision
from dit_video.weights.text_encoders import find_tokenizer_folder
from dit_video.weights.torch_files import read_torch_tensors

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(weight|bias)")
_LINEAR = re.compile(r"(?:(?:.*\.)?(?:predictor|linear|model|layer)\.)?(weight|bias)")
_RELU_GAP = 3
"""Distance between the numbers of the first two linear layers where ReLU and dropout lie between them; 2 where there is
dropout alone."""


@dataclass(frozen=True)
class AestheticHead:
    """A stack of linear layers."""

    weights: tuple[Float32[np.ndarray, "_o _i"], ...]
    biases: tuple[Float32[np.ndarray, "_o"], ...]
    has_relu: bool
    digest: str

    @property
    def width(self) -> int:
        """Return the width of the embeddings: 768 for ViT-L/14."""
        return self.weights[0].shape[1]

    def __call__(self, embeddings: Float32[np.ndarray, "n P"]) -> Float32[np.ndarray, " n"]:
        """Return the scores of embeddings of length 1, most often from 1 to 10."""
        x = embeddings
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = np.maximum(x, 0) if number and self.has_relu else x
            x = x @ weight.T + bias
        return x[:, 0]


def load_aesthetic_head(path: str | Path) -> AestheticHead:
    """Read a head.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is damaged, or holds no head of a known layout.
    """
    path = Path(path)
    tensors = load(path) if path.suffix == ".safetensors" else read_torch_tensors(path)
    tensors = {name: value for name, value in tensors.items() if isinstance(value, np.ndarray)}
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = value
    if not layers and (names := {match[1]: name for name in tensors if (match := _LINEAR.fullmatch(name))}):
        layers = {0: {kind: tensors[name] for kind, name in names.items()}}
    numbers = sorted(layers)
    is_complete = all(layers[number].keys() == {"weight", "bias"} for number in numbers)
    if not numbers or not is_complete or not _is_chain([layers[number]["weight"].shape for number in numbers]):
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in list(tensors.items())[:6])
        raise UserError(
            f"{path} holds no aesthetic head ({shapes or 'no tensors'}). Use LAION's file, such as "
            "sac+logos+ava1-l14-linearMSE.pth: layers.0.weight … layers.7.bias, or weight and bias"
        )
    weights = tuple(layers[number]["weight"].astype(np.float32) for number in numbers)
    biases = tuple(layers[number]["bias"].astype(np.float32) for number in numbers)
    digest = hashlib.sha256(b"".join(value.tobytes() for value in (*weights, *biases))).hexdigest()
    has_relu = len(numbers) > 1 and numbers[1] - numbers[0] == _RELU_GAP
    return AestheticHead(weights, biases, has_relu, digest)


def _is_chain(shapes: list[tuple[int, ...]]) -> bool:
    """Return True if each layer reads what the one before returns, and the last one returns one number."""
    if any(len(shape) != 2 for shape in shapes):
        return False
    return shapes[-1][0] == 1 and all(a[0] == b[1] for a, b in itertools.pairwise(shapes))


THUMBNAIL_SIDE = 16
"""Height and width of thumbnails, by which copies are told from second takes."""


@dataclass(frozen=True, kw_only=True)
class ClipScores(Annotator):
    """CLIP's embedding of a clip, its aesthetic score, and the cosine of frames and captions (arXiv 2103.00020)."""

    threads: ClassVar[int] = 2

    folder: str = "weights/clip"
    """Folder of a `CLIPModel` of `transformers` with its tokenizer and image settings, such as
    `openai/clip-vit-large-patch14`, which LAION's aesthetic heads are for."""
    aesthetic: str = ""
    """File of an aesthetic head; empty for none."""
    frames: int = 8
    """Maximum number of frames of a clip, at even spacing."""

    @property
    def name(self) -> str:
        return "clip"

    @property
    def columns(self) -> Mapping[str, Column]:
        shape = pa.list_(pa.float16(), self._model.width)
        mirrored = "Mean of its frames' and mirrored frames' embeddings, of length 1"
        columns = {
            "embedding": Column(type=shape, description=f"CLIP's embedding of the clip. {mirrored}."),
            "text_match": Column(
                type=pa.float32(), description="Mean cosine of frames and captions; that of the best of several."
            ),
        }
        side = THUMBNAIL_SIDE
        columns["thumbnails"] = Column(
            # Lists of 4,096 values would pass 32-bit offsets at 524,288 clips.
            type=pa.large_binary(),
            description=f"Luma of twice as many frames, a byte a pixel of {side}×{side}.",
        )
        if self.aesthetic:
            columns["aesthetic"] = Column(type=pa.float32(), description="Mean aesthetic score of frames.")
        return columns

    @property
    def identity(self) -> str:
        return f"clip 2, {self._model.digest}, {self.frames} frames"

    @property
    def reads_captions(self) -> bool:
        return True

    def check(self) -> None:
        model = self._model
        if model.head is not None and model.head.width != model.width:
            raise UserError(
                f"aesthetic={self.aesthetic} is invalid: it reads embeddings of {model.head.width} numbers, and the "
                f"CLIP in {self.folder} makes {model.width}. Use the head of this CLIP"
            )

    def annotate(self, clip: ClipFile) -> Mapping[str, Any]:
        model, dense = self._model, clip.decode_frames(2 * self.frames).frames
        frames = dense[:: max(1, round(len(dense) / self.frames))]
        embeddings = normalize(model.encode_frames(frames))
        mirrored = normalize(model.encode_frames(np.ascontiguousarray(frames[:, :, ::-1])))
        mean = normalize((embeddings + mirrored).mean(axis=0))
        luma = resize(dense, THUMBNAIL_SIDE, THUMBNAIL_SIDE) @ np.array([0.299, 0.587, 0.114], np.float32)
        thumbnails = np.rint(luma).astype(np.uint8).tobytes()
        values: dict[str, Any] = {
            "embedding": mean.astype(np.float16),
            "thumbnails": thumbnails,
            "text_match": None,
        }
        if clip.info.captions:
            texts = np.stack([model.encode_text(text) for text in clip.info.captions])
            values["text_match"] = float((embeddings @ texts.T).mean(axis=0).max())
        if model.head is not None:
            values["aesthetic"] = float(model.head(embeddings).mean(axis=0))
        return values

    @functools.cached_property
    def _model(self) -> "_OpenModel":
        return _open(self)


@dataclass(frozen=True)
class _OpenModel:
    encode_frames: FrameEncoder
    encode_text: Callable[[str], Float32[np.ndarray, " P"]]
    head: AestheticHead | None
    width: int
    digest: str


def normalize(rows: Float32[np.ndarray, "*n P"]) -> Float32[np.ndarray, "*n P"]:
    """Return vectors of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _open(config: ClipScores) -> _OpenModel:
    folder = config.folder
    vision, text = load_clip_vision(folder), load_clip_text(folder)
    if text.config.projection is None or text.config.projection != vision.config.projection:
        raise UserError(f"folder={folder} is invalid: its towers have no projection to one space. Use a CLIPModel")
    positions = text.config.positions
    tokenize = PretrainedTokenizer(find_tokenizer_folder(Path(folder)), max_tokens=positions)
    head = load_aesthetic_head(config.aesthetic) if config.aesthetic else None
    graph = get_graph_def(text.config.make)
    embed = jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask).projected)

    @functools.lru_cache(maxsize=4096)
    def encode_text(caption: str) -> Float32[np.ndarray, " P"]:
        tokens = tokenize(caption)
        ids, mask = np.zeros((2, 1, positions), np.int32)
        ids[0, : len(tokens)], mask[0, : len(tokens)] = tokens, 1
        return normalize(np.asarray(embed(text.params, ids, mask), np.float32)[0])

    encode_frames = FrameEncoder(vision.config, vision.params, load_clip_image_processor(folder))
    digest = f"{vision.digest[:16]} {text.digest[:16]} {tokenize.identity[:16]}"
    digest += f", aesthetic {head.digest[:16]}" if head else ""
    return _OpenModel(encode_frames, encode_text, head, text.config.projection, digest)
