"""Requests of an evaluation: prompts of the rendered shapes, or captions of clips."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dit_video.core import rng
from dit_video.data.clips import ClipSource
from dit_video.data.sizes import SizeLimits, fit_size, read_fitted_clip
from dit_video.models.autoencoders import LinearAutoencoder
from dit_video.sampling.request import Request
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.video import Clip


class EvaluationClips(NamedTuple):
    """Clips of a training, on which its models are evaluated."""

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
    """Returns a clip of the data with this prompt, of the sample's size."""
    is_trained_caption: bool = False
    """True if the prompt belongs to a training clip."""
    scene: Any = None
    """True content of the reference, if it is rendered: description and geometry of the shape."""


def make_shape_requests(seed: int) -> list[Request]:
    """Return all 72 prompts at 17 and 9 frames, and the 18 image prompts, each once at one of three sizes."""
    prompts = [
        (frames, description)
        for frames, descriptions in ((17, shapes.COMBINATIONS), (9, shapes.COMBINATIONS), (1, shapes.IMAGES))
        for description in descriptions
    ]
    sizes = ((32, 32), (32, 48), (48, 32))
    size_indices = rng.make_generator(seed, "sample sizes").permutation(np.arange(len(prompts)) % len(sizes)).tolist()
    return [
        Request(shapes.format_caption(description), Grid(frames, *sizes[size]), seed=_make_seed(seed, number))
        for number, ((frames, description), size) in enumerate(zip(prompts, size_indices, strict=True))
    ]


def add_shape_reference(request: Request) -> EvaluationRequest:
    """Return the request with a rendering of its prompt, which starts where the request's seed says."""
    description, (frames, height, width) = shapes.parse_caption(request.prompt), request.grid
    generator = rng.make_generator(request.seed, "reference")
    geometry = shapes.sample_geometry(generator, description, height=height, width=width)
    render = functools.partial(shapes.render, description, geometry, frames=frames, height=height, width=width)
    return EvaluationRequest(request, render, description not in shapes.HELD_OUT, (description, geometry))


def make_caption_requests(
    clips: ClipSource, limits: SizeLimits, *, count: int, seed: int, first_index: int = 0, use_first_frame: bool = False
) -> list[EvaluationRequest]:
    """Return requests for up to `count` different captions, spread over the clips, each at its clip's training size.

    `first_index` is the number of the first request in its evaluation, which determines its seed. With
    `use_first_frame` a request starts from the first frame of the clip.
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
            EvaluationRequest(Request(caption, size, _make_seed(seed, first_index + number), image=image), read)
        )
    return requests


def _make_seed(seed: int, number: int) -> int:
    """Return a seed that differs between the requests of an evaluation, and between evaluations."""
    return (1000 * seed + number) % 2**32
