"""Folders of samples for tests, as `write_samples` writes them, without a pipeline."""

import json

import numpy as np

from dit_video.video import Clip

SECRET = "weights-of-nobody"
"""Text in the recipe of every sample."""


def write_sample_folder(folder, prompts, *, shade=128, frames=8, images=()):
    """Write a moving square for each prompt, or an image for those of `images`, and `prompts.json`."""
    folder.mkdir(parents=True)
    entries = []
    for number, prompt in enumerate(prompts):
        count = 1 if prompt in images else frames
        pixels = np.full((count, 32, 48, 3), shade, np.uint8)
        for frame in range(count):
            pixels[frame, 8:20, 2 + 3 * frame : 14 + 3 * frame] = (250, 30 * (number % 8), 60)
        name = f"{number:03d}-sample.{'png' if count == 1 else 'mp4'}"
        Clip(pixels, 16.0, prompt, {"weights": SECRET}).save(folder / name)
        entries.append({"file": name, "prompt": prompt, "frames": count, "height": 32, "width": 48, "seed": number})
    (folder / "prompts.json").write_text(json.dumps(entries))
    return folder
