"""Heads that score the aesthetics of an image from its CLIP embedding of length 1, in their published files.

Known are LAION's linear heads (`sa_0_4_vit_l_14_linear.pth` and alike), its improved predictors
(`sac+logos+ava1-l14-linearMSE.pth`, `ava+logos-l14-linearMSE.pth`, and `ava+logos-l14-reluMSE.pth`), and their copies
in models of `transformers`, which also hold the vision tower. Files may be safetensors or those of PyTorch.
"""

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.weights import load
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
      MissingError: the file does not exist.
      UserError: the file is damaged, or holds no head of a known layout.
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
