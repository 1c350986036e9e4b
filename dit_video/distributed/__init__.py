"""Distributed computation: the device mesh, path rules that shard arrays over it, and sharded attention."""

from dit_video.distributed.checks import check_denoiser
from dit_video.distributed.context_parallel import (
    MeshPartitioner,
    RingAttention,
    ShardedAttention,
    make_abstract_partitioner,
    make_partitioner,
)
from dit_video.distributed.mesh import AXES, Parallelism, Slices, make_mesh
from dit_video.distributed.sharding import (
    RowPart,
    ShardingRules,
    count_row_shards,
    make_batch_sharding,
    make_batch_shardings,
    make_shardings,
    shard_batch,
)
