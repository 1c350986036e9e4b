"""Devices of a pipeline: its weights on them, the placement of weights that are read, and the decoding of clips."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32, UInt8

from dit_video.core.offload import Offload, put_in_host_memory
from dit_video.data.latents.codec import LatentCodec
from dit_video.distributed import MeshPartitioner, Parallelism, count_row_shards, make_mesh, make_shardings
from dit_video.distributed.checks import check_denoiser
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.nn.attention import check_platform
from dit_video.nn.partitioner import ONE_DEVICE, Partitioner
from dit_video.sampling.plan import DecodingChange, FrameChange
from dit_video.sampling.program import put_on_devices
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from dit_video.video import Clip
from dit_video.weights.parameter import Placement

_BATCH = 8
"""Number of clips that are decoded at once on one device."""


class PipelineDevices(NamedTuple):
    """The devices that sample together: those of a mesh, or the default one."""

    mesh: Mesh | None = None
    partitioner: Partitioner = ONE_DEVICE
    """Attention and sharding of weights that the denoiser is made with."""

    @staticmethod
    def make(parallel: Parallelism | None, backbone: BackboneConfig) -> "PipelineDevices":
        """Return the devices that share the work, or the default one.

        Raises:
          UserError: If the mesh does not fit the devices, its axes do not divide the denoiser's heads and widths, or
            the devices lack the kernels of the attention.
        """
        if parallel is None:
            check_platform(backbone.attention, ONE_DEVICE.platform)
            return PipelineDevices()
        mesh = make_mesh(parallel)
        partitioner = MeshPartitioner(mesh, parallel.context_attention)
        # Rows and tokens are padded to what the devices divide.
        check_denoiser(partitioner, backbone, rows=count_row_shards(mesh), tokens=mesh.shape["context"])
        return PipelineDevices(mesh, partitioner)

    @property
    def local_count(self) -> int:
        """Return the number of devices of this process."""
        return 1 if self.mesh is None else len(self.mesh.local_devices)

    def put(self, params: dict[str, Any], *, offload: Offload | None, mesh: Mesh | None) -> dict[str, Any]:
        """Put parameters on the devices, or in host memory with `offload`, unless they are there.

        Args:
          params: Parameters.
          offload: Weights in host memory; None for none.
          mesh: Mesh that shards them; None for the default device.
        """
        if offload is None:
            return _put_params(params, mesh)
        return put_in_host_memory(params if mesh is None else _put_params(params, mesh))

    def make_clip_codec(self, codec: LatentCodec) -> LatentCodec | None:
        """Return a codec that shares clips among this process's devices, whose number it needs; None for one device."""
        if self.mesh is None or self.local_count < 2:
            return None
        clips = Mesh(self.mesh.local_devices, ("clips",))
        params = jax.device_put(codec.params, NamedSharding(clips, PartitionSpec()))
        sharding = NamedSharding(clips, PartitionSpec("clips"))
        return LatentCodec(codec.config, params, memory=codec.memory, tiles=codec.tiles, sharding=sharding)


class SampledLatents(NamedTuple):
    """Latents that were sampled for a request."""

    latents: Float32[np.ndarray, "_ _ _ c"]
    """Normalised latents `t h w c`."""
    request: Request
    """The request, with its size."""
    recipe: Mapping[str, Any]
    """Recipe of the clip; see `clip_recipe`."""
    decoding: DecodingChange | None = None
    """Change of what is decoded; see `SamplingPlan`."""
    finish: FrameChange | None = None
    """Change of the decoded frames; see `SamplingPlan`."""

    def extend(self) -> Float32[np.ndarray, "_ _ _ c"]:
        """Return the latents that are decoded."""
        return self.latents if self.decoding is None else self.latents[self.decoding.list_frames(len(self.latents))]

    def make_clip(self, decoded: UInt8[np.ndarray, "_ H W 3"], *, fps: float) -> Clip:
        """Return the clip of the decoded frames."""
        frames = decoded if self.decoding is None else self.decoding.cut(decoded)
        frames = frames if self.finish is None else self.finish(frames)
        return Clip(frames=frames, fps=fps, caption=self.request.prompt, recipe=self.recipe)


class ClipDecoder(NamedTuple):
    """A codec on one device, and one that shares clips among devices."""

    codec: LatentCodec
    fps: float
    """Frame rate of the clips."""
    shared: LatentCodec | None = None
    """Codec whose devices share the clips of a size; None for one device."""
    device_count: int = 1
    """Number of devices of the shared codec, which the number of its clips is padded to."""

    def check_memory(self, grids: Sequence[Grid]) -> None:
        """Check that clips of these latent grids can be decoded in the codec's memory, before they are sampled.

        Raises:
          UserError: If the memory is too small.
        """
        for grid, count in Counter(grids).items():
            codec, batch = self._choose_codec(count)
            codec.get_chunk_length("decode", batch, grid)

    def __call__(self, samples: Sequence[SampledLatents]) -> list[Clip]:
        """Decode samples to clips: those of one size together, so that a size compiles once."""
        latents = [sample.extend() for sample in samples]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, each in enumerate(latents):
            by_shape.setdefault(each.shape, []).append(index)
        clips: dict[int, Clip] = {}
        for members in by_shape.values():
            codec, batch = self._choose_codec(len(members))
            for start in range(0, len(members), batch):
                part = members[start : start + batch]
                padded = part + part[-1:] * (batch - len(part))
                stacked = np.stack([latents[index] for index in padded])
                frames = codec.decode_many(stacked, seeds=[samples[index].request.seed for index in padded])
                for index, decoded in zip(part, frames, strict=False):
                    clips[index] = samples[index].make_clip(decoded, fps=self.fps)
        return [clips[index] for index in range(len(samples))]

    def _choose_codec(self, count: int) -> tuple[LatentCodec, int]:
        """Return the codec for clips of one size, and how many of them it decodes at once."""
        if self.shared is not None and count > 1:
            return self.shared, self.device_count
        return self.codec, min(_BATCH, count)


def make_placement(parallel: Parallelism | None, offload: Offload | None = None) -> Placement:
    """Return the placement of a pipeline's weights while they are read, on devices or in host memory.

    On several devices the denoiser's are sharded as in training; each process has the autoencoder on its first device.
    """
    mesh = None if parallel is None else make_mesh(parallel)

    def place(path: str, parameter: Any) -> jax.Array:
        sharding = None
        if mesh is not None and not path.startswith("autoencoder/"):
            sharding = make_shardings({path: parameter}, mesh)[path]
        return parameter.to_device(sharding) if offload is None else parameter.to_host_memory(sharding)

    return place


def _put_params(params: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Put parameters on the devices once: sharded as in training, or without a mesh on the default device.

    Arrays that are on devices already stay there; on a mesh only those that are on all of its devices.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, params)
    return jax.tree.map(functools.partial(_put_param, mesh=mesh), params, make_shardings(params, mesh))


def _put_param(leaf: Any, sharding: NamedSharding, *, mesh: Mesh) -> jax.Array:
    is_in_place = isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(mesh.devices.flat)
    return leaf if is_in_place else put_on_devices(leaf, sharding)
