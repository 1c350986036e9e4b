"""Requests of an evaluation: prompts, and what metrics compare their samples with."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dit_video.data.clips import ClipSource
from dit_video.data.sizes import SizeLimits, fit_size, read_fitted_clip
from dit_video.models.autoencoders import LinearAutoencoder
from dit_video.sampling.request import Request
from dit_video.video import Clip


class EvaluationClips(NamedTuple):
    """Clips of a training run, on which its models are evaluated."""

    training: ClipSource
    held_out: ClipSource
    """Clips that were not trained on."""
    limits: SizeLimits
    """Limits of the training sizes."""
    linear: Callable[[], LinearAutoencoder | None]
    """Returns a linear autoencoder with as many latent values as the trained one, if any, as a baseline."""


class EvaluationRequest(NamedTuple):
    """A request for a sample, and what metrics compare the sample with."""

    request: Request
    read_reference: Callable[[], Clip]
    """Returns a data clip with this prompt, in the sample's size."""
    is_trained_caption: bool = False
    """True if the prompt belongs to a training clip."""
    scene: Any = None
    """True content of the reference, if it is rendered: a value that only metrics for such data read."""


def make_caption_requests(
    clips: ClipSource, limits: SizeLimits, *, count: int, seed: int, first_index: int = 0, use_first_frame: bool = False
) -> list[EvaluationRequest]:
    """Return requests for up to `count` different captions, spread over the clips, each at its clip's training size.

    `first_index` is the number of the first request in its evaluation, which determines its seed. With
    `use_first_frame`, a request starts from the first frame of the clip.
    """
    different: dict[str, int] = {}
    for index, info in enumerate(clips.infos):
        if info.caption:
            different.setdefault(info.caption, index)
    positions = np.linspace(0, len(different) - 1, min(count, len(different))).round().astype(int)
    requests = []
    for number, position in enumerate(positions.tolist()):
        index = list(different.values())[position]
        read = functools.partial(read_fitted_clip, clips, index, limits)
        size, caption = fit_size(clips.infos[index], limits), clips.infos[index].caption
        image = read().frames[0] if use_first_frame else None
        requests.append(
            EvaluationRequest(Request(caption, size, make_request_seed(seed, first_index + number), image=image), read)
        )
    return requests


def make_request_seed(seed: int, number: int) -> int:
    """Return a seed that differs between the requests of an evaluation, and between evaluations."""
    return (1000 * seed + number) % 2**32
