"""Twenty stand-ins for emoji: persons with a tone and a role who move up and down, and two pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 256
TONES = {"1f3fb": (250, 220, 190), "1f3fd": (200, 150, 110), "1f3ff": (90, 60, 40)}
PERSONS = {"1f468": "short hair", "1f469": "long hair"}
HAIR = (110, 60, 20)
ROLES = {"1f692": (210, 40, 40), "1f373": (240, 240, 240), "2708-fe0f": (40, 60, 200)}
"""Code points of the roles firefighter, cook and pilot, with the colours of their clothes."""
PICTURES = {"2764-fe0f": (220, 20, 60), "1f7e6": (20, 60, 220)}
"""Code points of a heart and a blue square, with their colours."""
STEMS: tuple[str, ...] = (
    *(f"{person}-{tone}-200d-{role}" for role in ROLES for person in PERSONS for tone in TONES),
    *PICTURES,
)


def draw_emoji(stem: str) -> tuple[Sequence[np.ndarray], float]:
    """Return the frames of an emoji as RGBA, and the seconds of its period."""
    if stem in PICTURES:
        image = Image.new("RGBA", (SIDE, SIDE))
        ImageDraw.Draw(image).rectangle((60, 60, 196, 196), fill=PICTURES[stem])
        return [np.asarray(image)], 0.0
    person, tone, _, role = stem.split("-", 3)
    count = 36 if person == "1f468" else 48
    frames = []
    for number in range(count):
        image = Image.new("RGBA", (SIDE, SIDE))
        draw, top = ImageDraw.Draw(image), 40 + round(30 * np.sin(2 * np.pi * number / count))
        draw.rectangle((68, top + 100, 188, 250), fill=ROLES[role])
        if PERSONS[person] == "long hair":
            draw.rectangle((58, top, 198, top + 140), fill=HAIR)
        draw.ellipse((83, top, 173, top + 110), fill=TONES[tone])
        frames.append(np.asarray(image))
    return frames, count / 24


def write_emoji(folder: Path) -> Path:
    """Write the stand-ins as animated WebP, and return the folder."""
    for stem in STEMS:
        frames, _ = draw_emoji(stem)
        first, *others = (Image.fromarray(frame) for frame in frames)
        options = {"save_all": True, "append_images": others, "duration": 1000 // 24} if others else {}
        first.save(folder / f"{stem}.webp", "WEBP", lossless=True, **options)
    return folder
