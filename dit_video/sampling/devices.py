"""Devices of a pipeline: its weights on them, and the placement of weights that are read."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_video.core.offload import Offload, put_in_host_memory
from dit_video.data.latents.codec import LatentCodec
from dit_video.distributed import MeshConfig, count_row_shards, make_parallelism, make_shardings
from dit_video.distributed.checks import check_denoiser
from dit_video.distributed.mesh import resolve_mesh
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.nn.attention import check_platform
from dit_video.nn.parallel import ONE_DEVICE, Parallelism
from dit_video.sampling.sharding import put_params
from dit_video.weights.parameter import Placement


class PipelineDevices(NamedTuple):
    """The devices that sample together: those of a mesh, or the default one."""

    mesh: Mesh | None = None
    parallel: Parallelism = ONE_DEVICE
    """Parallelism that the denoiser is made with."""

    @staticmethod
    def from_mesh(mesh: MeshConfig | Mesh | None, backbone: BackboneConfig) -> "PipelineDevices":
        """Return the devices of a mesh, or of its config.

        Raises:
          UserError: a mesh that does not fit the devices, or whose axes do not divide the denoiser's heads and widths;
            attention whose kernels the devices lack.
        """
        if mesh is None:
            check_platform(backbone.attention, ONE_DEVICE.platform)
            return PipelineDevices()
        devices, method = resolve_mesh(mesh)
        # Rows and tokens are padded to what the devices divide.
        rows, tokens = count_row_shards(devices), devices.shape["context"]
        check_denoiser(devices, backbone, rows=rows, tokens=tokens, context_attention=method)
        return PipelineDevices(devices, make_parallelism(devices, method))

    @property
    def local_count(self) -> int:
        """Return the number of devices of this process."""
        return 1 if self.mesh is None else len(self.mesh.local_devices)

    def put(self, params: dict[str, Any], *, offload: Offload | None, mesh: Mesh | None) -> dict[str, Any]:
        """Put parameters on the devices, or in host memory with `offload`, unless they are there.

        Args:
          params: parameters.
          offload: weights in host memory; None for none.
          mesh: mesh that shards them; None for the default device.
        """
        if offload is None:
            return put_params(params, mesh)
        return put_in_host_memory(params if mesh is None else put_params(params, mesh))

    def make_clip_codec(self, codec: LatentCodec) -> LatentCodec | None:
        """Return a codec that shares clips among this process's devices, whose number it needs; None for one device."""
        if self.mesh is None or self.local_count < 2:
            return None
        clips = Mesh(self.mesh.local_devices, ("clips",))
        params = jax.device_put(codec.params, NamedSharding(clips, PartitionSpec()))
        sharding = NamedSharding(clips, PartitionSpec("clips"))
        return LatentCodec(codec.config, params, memory=codec.memory, tiles=codec.tiles, sharding=sharding)


def make_placement(mesh: MeshConfig | Mesh | None, offload: Offload | None = None) -> Placement:
    """Return the placement of a pipeline's weights while they are read, on devices or in host memory.

    On a mesh the denoiser's are sharded as in training; each process has the autoencoder on its first device.
    """
    devices = None if mesh is None else resolve_mesh(mesh)[0]

    def place(path: str, parameter: Any) -> jax.Array:
        sharding = None
        if devices is not None and not path.startswith("autoencoder/"):
            sharding = make_shardings({path: parameter}, devices)[path]
        return parameter.to_device(sharding) if offload is None else parameter.to_host_memory(sharding)

    return place
