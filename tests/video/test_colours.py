"""HDR is mapped to the light that a display of standard dynamic range shows."""

import numpy as np
import pytest

from dit_video.tokens import Grid
from dit_video.video import decode, probe
from dit_video.video.colours import map_to_sdr
from support.hdr_videos import NITS, compute_hlg, compute_pq, encode_ramp


@pytest.mark.parametrize("tagged", [True, False], ids=["BT.2020", "no primaries"])
@pytest.mark.parametrize(("transfer", "number", "compute"), [("pq", 16, compute_pq), ("hlg", 18, compute_hlg)])
def test_high_dynamic_range_has_the_display_light_of_the_original_up_to_diffuse_white(
    transfer, number, compute, tagged
):
    content = encode_ramp(compute(NITS), number, tagged=tagged)
    assert probe(content).transfer == transfer
    expected = 255 * np.minimum(NITS / 203, 1) ** (1 / 2.4)  # BT.1886
    for size in (None, Grid(1, 8, 96)):
        bars = decode(content, size=size).frames[0, 4, 4::8].astype(int)
        assert np.abs(bars - expected[:, None]).max() <= 3


def test_standard_dynamic_range_is_not_mapped():
    contents = [encode_ramp(np.linspace(0, 1, 12), number) for number in (1, 14)]
    assert [probe(content).transfer for content in contents] == ["sdr", "sdr"]
    bars = [decode(content).frames[0, 4, 4::8].astype(int) for content in contents]
    for each in bars:
        assert np.abs(each - np.linspace(0, 255, 12)[:, None]).max() <= 1


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_colours_of_bt_2020_become_those_of_bt_709(transfer):
    """The matrix is that of ITU-R BT.2087, with white and grey unchanged."""
    expected = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    light = np.array([[0.3, 0.2, 0.25], [0.2, 0.3, 0.2], [0.25, 0.25, 0.3]])
    if transfer == "pq":
        signal = compute_pq(203 * light)
    else:  # the light of the display is that of the scene times its luminance to the power of 0.2
        luminance = light @ [0.2627, 0.6780, 0.0593]
        scene = light * 0.203 * (luminance[:, None] * 0.203) ** (1 / 1.2 - 1)
        signal = compute_hlg(1000 * scene**1.2)
    picture = np.rint(0xFFFF * signal).astype(np.uint16)[None]
    mapped = map_to_sdr(picture, transfer, 9)[0]
    np.testing.assert_allclose(mapped, 255 * np.clip(light @ expected.T, 0, 1) ** (1 / 2.4), atol=0.6)
    np.testing.assert_array_equal(map_to_sdr(picture, transfer, 2)[0], mapped)  # unknown primaries are BT.2020's
    same = map_to_sdr(picture, transfer, 1)[0]
    np.testing.assert_allclose(same, 255 * light ** (1 / 2.4), atol=0.6)
