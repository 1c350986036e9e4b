import jax
import pytest

from dit_video.distributed import AXES, MeshConfig, make_mesh
from dit_video.distributed.mesh import _sizes
from dit_video.errors import UserError


def test_one_device_makes_a_mesh_in_auto_mode():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor", "context")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "count", "sizes"),
    [
        (MeshConfig(), 8, (8, 1, 1, 1)),
        (MeshConfig(fsdp=2), 8, (4, 2, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, context=2), 8, (1, 4, 1, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 2, 1)),
        (MeshConfig(fsdp=8), 8, (1, 8, 1, 1)),
    ],
)
def test_the_free_axis_takes_what_is_left(config, count, sizes):
    assert _sizes(config, count) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=3), "fsdp=3 does not divide the 8 devices; use fsdp=1 or 2 or 4 or 8"),
        (
            MeshConfig(fsdp=4, context=4),
            "context=4 does not divide the 2 of 8 devices that are left for it; use context=1 or 2",
        ),
        (MeshConfig(data=2, fsdp=2), "uses 4 of 8 devices; use data=4, or -1"),
        (MeshConfig(data=16), "data=16 does not divide the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_would(config, message):
    with pytest.raises(UserError, match=message):
        _sizes(config, 8)


def test_sizes_are_checked_where_they_are_given():
    with pytest.raises(UserError, match="tensor=0 was given"):
        MeshConfig(tensor=0)
    with pytest.raises(UserError, match="only one mesh axis can be -1, data and fsdp are"):
        MeshConfig(fsdp=-1)
