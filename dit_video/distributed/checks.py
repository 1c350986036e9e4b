"""Checks that a model and its batches fit a mesh, before anything is computed."""

from jax.sharding import Mesh

from dit_video.core.errors import UserError
from dit_video.distributed.context_parallel import MeshPartitioner, check_ring, check_ulysses
from dit_video.distributed.sharding import count_row_shards
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.nn.attention import check_platform


def check_denoiser(partitioner: MeshPartitioner, backbone: BackboneConfig, *, rows: int, tokens: int) -> None:
    """Check that heads, hidden widths, rows and tokens divide among a mesh's devices, and that these have the kernels.

    Args:
      partitioner: The mesh and the method of attention over devices that share a row.
      backbone: The configuration of the denoiser.
      rows: Number of rows of a step's batch.
      tokens: Number of tokens of a row.

    Raises:
      UserError: If something does not divide, or the attention's kernels are for another platform; the message names
        it, and values that would do.
    """
    mesh = partitioner.mesh
    if isinstance(mesh, Mesh):
        check_platform(backbone.attention, partitioner.platform)
    _check_divisible(rows, count_row_shards(mesh), "a batch", "rows", "data x fsdp")
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    _check_divisible(backbone.heads, tensor, "the denoiser", "heads", "tensor")
    _check_divisible(backbone.mlp_dim, tensor, "the denoiser's MLP", "hidden values", "tensor")
    _check_divisible(tokens, context, "a row", "tokens", "context")
    if context > 1 and partitioner.context_attention == "ring":
        check_ring(backbone.attention)
    elif context > 1:
        check_ulysses(backbone.heads // tensor, context)


def _check_divisible(number: int, parts: int, owner: str, things: str, axes: str) -> None:
    if number % parts:
        divisors = [size for size in range(1, number + 1) if number % size == 0 and size <= 2 * parts]
        valid = ", ".join(str(size) for size in divisors)
        fix = f"Use a mesh with {axes} of {valid}, or {number + -number % parts} {things}."
        raise UserError(f"{owner} has {number} {things}, which {axes}={parts} devices do not divide. {fix}")
