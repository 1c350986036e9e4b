"""Sound of a scene: a decaying tone for each contact, lower for larger objects."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from dit_video.scenes.description import Scene
from dit_video.scenes.physics import SceneEvent

SAMPLE_RATE = 16_000
"""Samples per second."""
_DECAY_SECONDS, _LENGTH_SECONDS, _AMPLITUDE = 0.06, 0.4, 0.3
_PITCHES = {"bounce": 220.0, "collision": 660.0}
"""Pitch in Hz of a contact of objects that are a tenth of the frame's shorter side in radius."""


def synthesize(scene: Scene, events: Sequence[SceneEvent]) -> Float32[np.ndarray, " samples"]:
    """Return the sound of a scene's events, as long as its clip; a tone begins at the sample of its contact."""
    sound = np.zeros(round(scene.size.t / scene.fps * SAMPLE_RATE), np.float64)
    times = np.arange(round(_LENGTH_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    for event in events:
        start = round(event.seconds * SAMPLE_RATE)
        radius = np.mean([scene.objects[index].radius for index in event.objects])
        pitch = _PITCHES[event.kind] * 0.1 * min(scene.size.h, scene.size.w) / radius
        tone = _AMPLITUDE * np.exp(-times / _DECAY_SECONDS) * np.sin(2 * np.pi * pitch * times)
        room = max(0, min(len(tone), len(sound) - start))
        sound[start : start + room] += tone[:room]
    return np.clip(sound, -1.0, 1.0).astype(np.float32)
