"""Names of topologies, with several slices, and the devices that libtpu describes."""

import dataclasses
import sys

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.planning import CHIPS, Topology
from support.devices import check_on_eight_devices


def test_names_of_topologies_are_parsed():
    assert (Topology.parse("v5e:4x4").num_chips, str(Topology.parse("V5p:4x4x8"))) == (16, "v5p:4x4x8")
    assert Topology.parse("tpu7x:2x2x1").chip.name == "v7x"
    assert Topology.parse("h100:16").num_chips == 16


def test_several_slices_are_named_by_their_number():
    topology = Topology.parse("v5p:4x4x8*2")
    assert (topology.shape, topology.slices, topology.num_chips) == ((4, 4, 8), 2, 256)
    assert str(topology) == "v5p:4x4x8*2"
    assert Topology.parse("v5e:2x2*1") == Topology.parse("v5e:2x2")


def test_chips_that_are_not_in_the_table_can_be_added():
    chips = {**CHIPS, "cpu": dataclasses.replace(CHIPS["h100"], name="cpu", kind="cpu")}
    assert Topology.parse("cpu:2", chips).num_chips == 2
    with pytest.raises(UserError, match="chip 'cpu' is not supported"):
        Topology.parse("cpu:2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v3:4x4", "Use one of v4, v5e"),
        ("v5p:4x4", "v5p:4x4x4"),
        ("v5e:4x4x4", "v5e:4x4"),
        ("h100:2x4", "h100:8"),
        ("v6e:0x4", "2 sizes"),
        ("v6e", "v6e:4x4"),
        ("v5e:4x4*0", r"an integer of at least 1\. Use, for two slices, v5e:4x4\*2"),
        ("v5e:4x4*", r"'v5e:4x4\*' is not a topology: .* v5e:4x4\*2"),
        ("v5e:4x4*2*2", r"v5e:4x4\*2$"),
        ("v5e:4x4*-1", r"v5e:4x4\*2$"),
        ("h100:8*2", r"only TPUs come in slices, h100 are counted in all\. Use their number, such as h100:8"),
    ],
)
def test_unknown_topologies_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        Topology.parse(text)


def test_a_missing_libtpu_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(MissingError, match="pip install libtpu"):
        Topology.parse("v5e:4x4").get_devices()


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_programs_of_several_slices_move_what_is_computed_by_hand():
    """This takes a process of its own: one that has libtpu would look for TPUs from then on."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e '.[tpu]'")
    check_on_eight_devices("slice_traffic.py")
