"""Checks that a denoiser gets the first frames that it needs."""

from dataclasses import replace

import pytest

from dit_video.core.errors import UserError
from dit_video.models.backbones.protocol import check_frame_conditioning
from dit_video.models.conditioning import FrameConditioning
from support.tiny_wan import ANIMATING, DIT, VAE

ALWAYS = FrameConditioning(prob=1.0, rest="grey")


def check(backbone=ANIMATING, frames=ALWAYS, image_encoder="clip", cached=True):
    check_frame_conditioning(backbone, VAE, frames, image_encoder, cached=cached)


def test_consistent_settings_of_first_frames_are_accepted():
    check()
    check(frames=FrameConditioning(prob=0.5))
    check(backbone=replace(ANIMATING, image_width=None), image_encoder=None)
    check(backbone=replace(ANIMATING, cond_channels=0), frames=FrameConditioning())
    check(backbone=DIT, frames=None, image_encoder=None, cached=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": None}, r"frame_conditioning=None; set FrameConditioning\(\)"),
        (
            {"frames": None, "backbone": replace(ANIMATING, cond_channels=0)},
            r"frame_conditioning=None; set FrameConditioning\(prob",
        ),
        ({"image_encoder": None}, "set image_encoder to its folder"),
        ({"backbone": replace(ANIMATING, image_positions=20)}, "image_positions needs a last frame"),
        ({"cached": False}, "needs? cached latents; set data cache_latents=True"),
        ({"cached": False, "frames": FrameConditioning()}, "tokens need cached latents; set data cache_latents=True"),
        ({"backbone": replace(ANIMATING, cond_channels=5)}, "cond_channels=5 is invalid: .* must be 8, a mask of 4"),
        ({"backbone": replace(ANIMATING, image_width=None)}, "leave out image_encoder"),
        ({"backbone": DIT, "image_encoder": None, "frames": FrameConditioning()}, "needs cond_channels or time="),
    ],
)
def test_inconsistent_settings_of_first_frames_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check(**changes)
