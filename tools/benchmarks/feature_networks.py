"""Speed of the networks whose features metrics compare, against the same architectures in torch with the same weights.

Both run in one process, interleaved, in float32. torch uses as many threads as there are cores. The ratio is that of
the medians. The architectures in torch are those of the parity tests, which are eager calls of its own operations.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from benchmarks.peers import count_cores
from benchmarks.timer import time_median
from dit_video.core import trees
from dit_video.models.features.convolutional import C3d, I3d, InceptionV3
from dit_video.models.features.video_mae import VideoMaeConfig
from dit_video.nn import get_graph_def
from dit_video.weights import feature_networks
from dit_video.weights.tensor_map import TensorMapping

TESTS = Path(__file__).resolve().parents[2] / "tests"
CLIPS, IMAGES = 4, 8
"""Number of clips, or of images, of a batch."""
VIDEO_MAE = VideoMaeConfig(layers=4)
"""VideoMAE with a tenth of the published depth; all blocks take the same time."""

Weights = dict[str, np.ndarray]
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def measure(rounds: int, *, clips: int = CLIPS, images: int = IMAGES) -> dict[str, Any]:
    """Measure the seconds of a batch, by the name of the network.

    Raises:
      ModuleNotFoundError: If pytest is not installed, which the parity tests import.
    """
    torch.set_num_threads(count_cores())
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    peers, mae_peers = (
        SimpleNamespace(**runpy.run_path(str(TESTS / "features" / f"test_{name}_parity.py")))
        for name in ("classifiers", "video_mae")
    )
    makers: dict[str, Callable[[], Pair]] = {
        "I3D": lambda: _make_i3d(peers, clips),
        "Inception-v3": lambda: _make_inception(peers, images),
        "C3D": lambda: _make_c3d(peers, clips),
        f"VideoMAE, {VIDEO_MAE.layers} blocks": lambda: _make_video_mae(mae_peers, clips),
    }
    document: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, make in makers.items():
        document[name] = _compare(name, *make(), rounds) | {"batch": images if name == "Inception-v3" else clips}
    return document


def _make_i3d(peers: SimpleNamespace, count: int) -> Pair:
    tensor_map = feature_networks.make_i3d_tensor_map()
    weights = peers.make_weights(_build_i3d, tensor_map)
    pixels = _draw_pixels(count, 16, 224, 224, 3)
    theirs, clips = peers.TorchI3d(weights), _move_channels(pixels)
    return _make_ours(_build_i3d, tensor_map, weights, pixels), lambda: theirs(clips)


def _make_inception(peers: SimpleNamespace, count: int) -> Pair:
    tensor_map = feature_networks.make_inception_tensor_map()
    weights = peers.make_weights(_build_inception, tensor_map)
    pixels = _draw_pixels(count, 299, 299, 3)
    theirs, images = peers.TorchInception(weights), _move_channels(pixels)
    return _make_ours(_build_inception, tensor_map, weights, pixels), lambda: theirs(images)


def _make_c3d(peers: SimpleNamespace, count: int) -> Pair:
    tensor_map = feature_networks.make_c3d_tensor_map()
    weights = peers.make_weights(_build_c3d, tensor_map)
    pixels = _draw_pixels(count, 16, 112, 112, 3)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    clips = 128 * _move_channels(pixels)[:, [2, 1, 0]] + 128 - tensors["mean"]
    return _make_ours(_build_c3d, tensor_map, weights, pixels), lambda: peers.compute_c3d(tensors, clips)


def _make_video_mae(peers: SimpleNamespace, count: int) -> Pair:
    weights = peers.make_weights(VIDEO_MAE)
    tensor_map = peers.make_video_mae_tensor_map(VIDEO_MAE)
    pixels = _draw_pixels(count, VIDEO_MAE.frames, VIDEO_MAE.side, VIDEO_MAE.side, 3)
    theirs, clips = peers.TorchVideoMae(VIDEO_MAE, weights), (_move_channels(pixels) + 1) / 2
    return _make_ours(VIDEO_MAE.make, tensor_map, weights, pixels), lambda: theirs(clips)


def _build_i3d(rngs: nnx.Rngs) -> nnx.Module:
    return I3d(rngs=rngs)


def _build_inception(rngs: nnx.Rngs) -> nnx.Module:
    return InceptionV3(rngs=rngs)


def _build_c3d(rngs: nnx.Rngs) -> nnx.Module:
    return C3d(rngs=rngs)


def _draw_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def _move_channels(pixels: np.ndarray) -> torch.Tensor:
    """Return pixels in torch's order of axes."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1)))


def _make_ours(
    make: Callable[[nnx.Rngs], Any], tensor_map: dict[str, TensorMapping], weights: Weights, pixels: np.ndarray
) -> Callable[[], Any]:
    """Return a call of our network with weights in the published layout."""
    params = {}
    for path, mapping in tensor_map.items():
        arrays = [mapping.to_ours(weights[name]) for name in mapping.names]
        params[path] = arrays[0] if mapping.layers is None else np.stack(arrays)
    graph, on_device = get_graph_def(make), jax.device_put((trees.unflatten(params), pixels))
    call = jax.jit(lambda params, pixels: nnx.merge(graph, params)(pixels))
    return lambda: jax.block_until_ready(call(*on_device))


def _compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Measure the seconds of both and their largest difference, and print them to stderr."""
    with torch.inference_mode():
        expected = theirs().numpy()
        difference = np.abs(np.asarray(ours()) - expected).max(axis=None) / np.abs(expected).max(axis=None)
        seconds = time_median({"ours": ours, "torch": theirs}, rounds)
    print(f"{name}: {seconds['ours']:.3f} s, torch {seconds['torch']:.3f} s", file=sys.stderr, flush=True)
    return {
        "ours_seconds": round(seconds["ours"], 3),
        "torch_seconds": round(seconds["torch"], 3),
        "ratio": round(seconds["ours"] / seconds["torch"], 3),
        "relative_difference": float(difference),
        "rounds": rounds,
    }
