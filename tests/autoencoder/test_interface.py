import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_video.autoencoder import Autoencoder, AutoencoderConfig, PatchVae, PatchVaeConfig, clip_grid, latent_grid
from dit_video.errors import UserError
from dit_video.tokens import Grid

STRIDE = Grid(4, 8, 16)


@given(st.builds(Grid, *[st.integers(1, 9)] * 3), st.builds(Grid, *[st.integers(1, 9)] * 3))
def test_the_size_of_a_clip_and_of_its_latents(latents, stride):
    assert latent_grid(clip_grid(latents, stride), stride) == latents


def test_known_sizes():
    assert latent_grid(Grid(1, 8, 16), STRIDE) == Grid(1, 1, 1)
    assert latent_grid(Grid(81, 480, 832), Grid(4, 8, 8)) == Grid(21, 60, 104)
    assert clip_grid(Grid(21, 60, 104), Grid(4, 8, 8)) == Grid(81, 480, 832)
    # Without temporal stride every length fits.
    assert [latent_grid(Grid(t, 8, 16), Grid(1, 8, 16)).t for t in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (Grid(16, 64, 64), r"T=16 is not 1 \+ 4k for temporal stride 4; use 13 or 17"),
        (Grid(2, 64, 64), "T=2 .*; use 1 or 5"),
        (Grid(0, 64, 64), "T=0 .*; use 1 or 5"),
        (Grid(17, 60, 64), "height 60 is not divisible by the spatial stride 8; use 56 or 64"),
        (Grid(17, 5, 64), "height 5 .*; use 8 or 16"),
        (Grid(17, 0, 64), "height 0 .*; use 8 or 16"),
        (Grid(17, 64, 72), "width 72 is not divisible by the spatial stride 16; use 64 or 80"),
    ],
)
def test_a_size_that_does_not_fit_names_the_rule_the_value_and_the_fix(clip, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        latent_grid(clip, STRIDE)


@pytest.mark.parametrize(
    "clip", [Grid(16, 64, 64), Grid(0, 64, 64), Grid(17, 60, 64), Grid(17, 5, 64), Grid(17, 64, 72)]
)
def test_the_sizes_that_are_named_fit(clip):
    with pytest.raises(UserError) as raised:
        latent_grid(clip, STRIDE)
    message = str(raised.value)
    axis = {"T": 0, "h": 1, "w": 2}[message[0]]
    for length in message.rpartition("use ")[2].split(" or "):
        sizes = list(clip)
        sizes[axis] = int(length)
        assert latent_grid(Grid(*sizes), STRIDE)


def test_the_patch_autoencoder_keeps_the_interface():
    assert isinstance(PatchVaeConfig(), AutoencoderConfig)
    assert issubclass(PatchVae, Autoencoder)
