"""Weights in host memory that are copied to the devices when they are used.

Arrays in host memory are `jax.Array`s with the memory kind `pinned_host`, sharded as on the devices; see
`jax.memory.Space`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from dit_video.core.trees import map_with_path

HOST, DEVICE = "pinned_host", "device"
"""Memory kinds of JAX's shardings."""
Tree = TypeVar("Tree")


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Weights lie in host memory; one stage of generation at a time has its weights on the devices.

    The stages are the text encoder, the image encoder, each expert of the denoiser, and the autoencoder. The text
    encoder and each expert move once for all requests of a call.
    """


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Like `Stages`, but the layers of stacks move one at a time, for weights that do not fit on the devices.

    A pass of a model moves all of its layers, which takes longer than their computation if a pass has few tokens. The
    text encoder makes one pass, the denoiser one for each step and branch of guidance.
    """

    text: bool = True
    """Moves the layers of the text encoder one at a time."""
    denoiser: bool = True
    """Moves the layers of the denoiser one at a time."""


Offload = Stages | Layers
OFFLOADS: dict[str, Offload | None] = {
    "stages": Stages(),
    "text-layers": Layers(denoiser=False),
    "layers": Layers(),
    "none": None,
}
"""Options for weights in host memory, by their names on the command line."""


def streams_layers(offload: Offload | None, part: Literal["text", "denoiser"]) -> bool:
    """Return True if the layers of a part move to the devices one at a time."""
    return isinstance(offload, Layers) and (offload.text if part == "text" else offload.denoiser)


def get_host_sharding(sharding: Sharding | None = None) -> Sharding:
    """Return the host-memory sharding of an array whose sharding on devices is `sharding`; by default, one device."""
    if sharding is None:
        # The default device may be set for a part of a program, and only a new array reveals it.
        sharding = SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
    return sharding.with_memory_kind(HOST)


def put_in_host_memory(tree: Tree) -> Tree:
    """Move arrays to host memory; arrays that are already there stay as they are."""

    def put(leaf: Any) -> jax.Array:
        if not isinstance(leaf, jax.Array):
            return jax.device_put(leaf, get_host_sharding())
        return leaf if is_in_host_memory(leaf) else jax.device_put(leaf, get_host_sharding(leaf.sharding))

    return jax.tree.map(put, tree)


@contextlib.contextmanager
def move_to_devices(tree: Tree, *, streams_layers: bool = False) -> Iterator[Tree]:
    """Move arrays from host memory to the devices while a `with` block runs; the copies are freed at its end.

    Arrays on the devices stay as they are. Results computed from the copies must be complete at the end of the block
    (`jax.block_until_ready`); otherwise the copies are freed later.

    Args:
      tree: Arrays.
      streams_layers: Leaves the kernels of stacked layers where they are, since a scan over the layers moves one
        layer's kernels at a time (`nn.scan_layers`).
    """
    copies: list[jax.Array] = []

    def move(path: str, leaf: Any) -> Any:
        stays = streams_layers and is_stacked_kernel(path, leaf)
        if not isinstance(leaf, jax.Array) or not is_in_host_memory(leaf) or stays:
            return leaf
        copies.append(_copy_to_devices(leaf))
        return copies[-1]

    try:
        yield map_with_path(move, tree)
    finally:
        for copy in copies:
            copy.delete()


def copy_to_devices(tree: Tree) -> Tree:
    """Return arrays on the devices: arrays in host memory are copied, the others stay as they are."""
    return jax.tree.map(lambda leaf: _copy_to_devices(leaf) if is_in_host_memory(leaf) else leaf, tree)


def _copy_to_devices(array: jax.Array) -> jax.Array:
    return jax.device_put(array, array.sharding.with_memory_kind(DEVICE))


def is_stacked_kernel(path: str, leaf: Any) -> bool:
    """Return True for the kernels of stacked layers (`blocks/NAME/kernel`, not `blocks/0/NAME/kernel`).

    Other arrays are small, and XLA for TPUs cannot slice some small arrays in host memory.
    """
    _, separator, name = f"/{path}".rpartition("/blocks/")
    return bool(separator) and not name.split("/")[0].isdigit() and name.endswith("/kernel") and len(leaf.shape) == 3


def is_in_host_memory(array: jax.Array) -> bool:
    """Return True if an array lies in host memory."""
    return array.sharding.memory_kind == HOST
