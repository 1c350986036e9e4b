"""Protocols on rendered scenes, which need no downloads: scenes of captions, and scenes of the laws of motion."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dit_video.core.errors import UserError
from dit_video.evaluation.clip_set import ClipSet
from dit_video.evaluation.protocol import Protocol
from dit_video.sampling.pictures import Condition
from dit_video.sampling.request import Request
from dit_video.scenes.draw import FREE_FRAMES, SIZES
from dit_video.scenes.laws import LAWS, MIN_FRAMES, Law
from dit_video.scenes.truths import SceneTruth, make_physics_set, make_scene_set
from dit_video.tokens import Grid
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class RenderedProtocol(Protocol, abc.ABC):
    """A protocol on rendered scenes, which are drawn from its seed: captions, clips of the data and their truths."""

    @abc.abstractmethod
    def make_scenes(self) -> tuple[ClipSet, tuple[SceneTruth, ...]]:
        """Return the scenes as clips of the data, and their truths."""

    def add_known_frames(
        self, requests: Sequence[Request], clips: Sequence[Callable[[], Clip]], *, fps: float | int
    ) -> list[Request]:
        """Return requests for samples of scenes with what the model gets of their renderings, which is nothing.

        Args:
          requests: requests of the scenes' captions.
          clips: functions that render the scene of each request.
          fps: frames per second of the samples.
        """
        return list(requests)

    @property
    def scene_count(self) -> int:
        """Return the number of scenes."""
        return self.real_count or self.count or 1


@dataclass(frozen=True, kw_only=True)
class SceneProtocol(RenderedProtocol):
    """A protocol on scenes whose caption says all that is judged."""

    levels: tuple[int, ...] = (1, 2)
    """Levels of the scenes."""
    sizes: tuple[Grid, ...] = tuple(size for size in SIZES if size.t == FREE_FRAMES)
    """Sizes of the scenes."""

    def make_scenes(self) -> tuple[ClipSet, tuple[SceneTruth, ...]]:
        """Return scenes of the levels in turn."""
        return make_scene_set(self.scene_count, seed=self.seed, levels=self.levels, sizes=self.sizes)


@dataclass(frozen=True, kw_only=True)
class PhysicsProtocol(RenderedProtocol):
    """A protocol on scenes that each show one law of motion, as many of each law.

    Raises:
      UserError: more known frames than there are before every contact, or less than none.
    """

    laws: tuple[Law, ...] = LAWS
    """Laws that the scenes show, in turn."""
    sizes: tuple[Grid, ...] | None = None
    """Sizes of the scenes; None for those of each law."""
    known: int = 0
    """Number of first frames of its scene that a sample continues; 0 for samples of the caption alone."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.known <= MIN_FRAMES:
            rule = f"a contact may follow after {MIN_FRAMES} frames, and the law is to be judged by the others"
            raise UserError(f"known={self.known} is invalid: {rule}. Use 0 to {MIN_FRAMES}.")

    def make_scenes(self) -> tuple[ClipSet, tuple[SceneTruth, ...]]:
        """Return scenes of the laws in turn."""
        return make_physics_set(self.scene_count, seed=self.seed, laws=self.laws, sizes=self.sizes)

    def add_known_frames(
        self, requests: Sequence[Request], clips: Sequence[Callable[[], Clip]], *, fps: float | int
    ) -> list[Request]:
        """Return the requests with the first frames of the scenes' renderings as their conditions.

        Raises:
          UserError: samples of another rate, in which the scenes would move at another speed.
        """
        if not self.known:
            return list(requests)
        completed = []
        for request, read in zip(requests, clips, strict=True):
            clip = read()
            if clip.fps != fps:
                rule = f"scenes, whose first frames the samples continue, have {clip.fps:g} frames per second"
                raise UserError(f"fps={fps:g} is invalid: {rule}. Use a model of this rate, or the protocol physics.")
            content = replace(clip, frames=np.ascontiguousarray(clip.frames[: self.known]))
            completed.append(request._replace(conditions=(Condition(content=content),)))
        return completed
