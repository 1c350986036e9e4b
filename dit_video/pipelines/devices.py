"""Devices of a pipeline: its weights on them, and the placement of weights that are read."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_video.backbones.protocol import BackboneConfig
from dit_video.distributed import MeshConfig, count_row_shards, make_parallelism, make_shardings
from dit_video.distributed.checks import check_denoiser
from dit_video.distributed.mesh import resolve_mesh
from dit_video.encoders.autoencoder import LatentCodec
from dit_video.generation.sharding import put_params
from dit_video.nn.attention import check_platform
from dit_video.nn.parallel import ONE_DEVICE, Parallelism
from dit_video.weights.parameter import Placement, place_on_device


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

    def put_denoiser(self, params: dict[str, Any], *, is_swapped: bool) -> dict[str, Any]:
        """Put the denoiser's parameters on the devices, unless they are there.

        Args:
          params: parameters of the denoiser's parts.
          is_swapped: leaves them where they are without a mesh, because of two experts one device holds one at a time.
        """
        return params if self.mesh is None and is_swapped else put_params(params, self.mesh)

    def make_clip_codec(self, codec: LatentCodec) -> LatentCodec | None:
        """Return a codec that shares clips among this process's devices, whose number it needs; None for one device."""
        if self.mesh is None or self.local_count < 2:
            return None
        clips = Mesh(self.mesh.local_devices, ("clips",))
        params = jax.device_put(codec.params, NamedSharding(clips, PartitionSpec()))
        return LatentCodec(codec.config, params, sharding=NamedSharding(clips, PartitionSpec("clips")))


def make_placement(mesh: Mesh) -> Placement:
    """Return the placement of a pipeline's weights on a mesh while they are read.

    The denoiser's are sharded as in training; each process has the autoencoder on its first device.
    """

    def place(path: str, parameter: Any) -> jax.Array:
        if path.startswith("autoencoder/"):
            return place_on_device(path, parameter)
        return parameter.to_device(make_shardings({path: parameter}, mesh)[path])

    return place
