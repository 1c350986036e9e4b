"""Many devices: the mesh, and path rules that lay arrays out on it."""

from dit_video.distributed.mesh import AXES, MeshConfig, make_mesh
from dit_video.distributed.rules import DEFAULT_RULES, ShardingRules, batch_sharding, row_shards, shard_batch, shardings

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "MeshConfig",
    "ShardingRules",
    "batch_sharding",
    "make_mesh",
    "row_shards",
    "shard_batch",
    "shardings",
]
