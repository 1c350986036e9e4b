"""Distributed computation: the device mesh, path rules that shard arrays over it, and sharded attention."""

from dit_video.distributed.checks import check_denoiser
from dit_video.distributed.context_parallel import OverDevices, over_devices
from dit_video.distributed.mesh import AXES, ContextAttention, MeshConfig, Slices, make_mesh
from dit_video.distributed.ring import Ring
from dit_video.distributed.sharding_rules import (
    DEFAULT_RULES,
    RowPart,
    ShardingRules,
    batch_sharding,
    batch_shardings,
    row_shards,
    shard_batch,
    shardings,
)

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "ContextAttention",
    "MeshConfig",
    "OverDevices",
    "Ring",
    "RowPart",
    "ShardingRules",
    "Slices",
    "batch_sharding",
    "batch_shardings",
    "check_denoiser",
    "make_mesh",
    "over_devices",
    "row_shards",
    "shard_batch",
    "shardings",
]
