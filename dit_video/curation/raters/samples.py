"""Samples of several systems, matched by their prompts, and anonymous and degraded copies of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import av

from dit_video.core import rng
from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.evaluation.clip_set import PROMPTS_FILE, list_samples
from dit_video.evaluation.distortions import distort
from dit_video.video import Clip, decode

SUFFIXES = (".mp4", ".webm", ".png")
"""Suffixes of files that a page can hold."""
_MAX_NAMED = 3
"""Maximum number of prompts that an error names."""
_BLUR = 1 / 16
"""Standard deviation of the blur of a degraded copy, in parts of the shorter side."""
_NOISE = 32
"""Standard deviation of its noise, of 255."""


class PromptSamples(NamedTuple):
    """The samples of all systems for a prompt."""

    prompt: str
    files: Mapping[str, Path]
    """File of each system's sample."""


def name_systems(folders: Sequence[Path], names: Sequence[str] = ()) -> dict[str, Path]:
    """Return the folders of samples by the names of their systems: by default the folder's name if names differ.

    Raises:
      UserError: If there are fewer than two folders or another number of names, or a name or a folder is given twice.
    """
    if len(folders) < 2:
        raise UserError(
            f"samples={[*map(str, folders)]} is invalid: two systems are compared. Use two folders or more."
        )
    if names and len(names) != len(folders):
        rule = f"there are {len(folders)} folders"
        raise UserError(f"names={[*names]} is invalid: {rule}. Use a name for each of them.")
    if not names:
        names = [folder.resolve().name for folder in folders]
        names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"names={repeated} is invalid: two systems have that name. Use different --names or folders.")
    return dict(zip(names, folders, strict=True))


def read_sample_sets(folders: Mapping[str, Path]) -> list[PromptSamples]:
    """Return the samples of every prompt, in the order of the first system.

    If a prompt has several samples, the first one of a system is matched with the first ones of the others, and so on.

    Args:
      folders: Folder of each system's samples, with `prompts.json`.

    Raises:
      MissingError: If a folder has no `prompts.json`, or a sample's file does not exist.
      UserError: If a list is damaged, or not all systems have the same prompts.
    """
    samples = {system: _read_folder(folder) for system, folder in folders.items()}
    first, *others = samples
    for other in others:
        for system, rest in ((first, other), (other, first)):
            if missing := [key for key in samples[system] if key not in samples[rest]]:
                texts = ", ".join(repr(prompt) for prompt, _ in missing[:_MAX_NAMED])
                more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
                raise UserError(
                    f"samples={folders[rest]} is invalid: {texts}{more} of {folders[system]} "
                    f"{'has' if len(missing) == 1 else 'have'} no match in it. Use one list of prompts for all systems."
                )
    return [
        PromptSamples(prompt, {system: files[prompt, number] for system, files in samples.items()})
        for prompt, number in samples[first]
    ]


def _read_folder(folder: Path) -> dict[tuple[str, int], Path]:
    """Return the file of each sample by prompt and number of the prompt's sample."""
    files: dict[tuple[str, int], Path] = {}
    counts: Counter[str] = Counter()
    for prompt, name in list_samples(folder):
        file = folder / name
        if file.suffix.lower() not in SUFFIXES:
            rule = f"a page shows {', '.join(SUFFIXES)}"
            raise UserError(f"{folder / PROMPTS_FILE}: file={name!r} is invalid: {rule}. Use one of these.")
        if not file.is_file():
            raise MissingError(f"no such file: {file} of {folder / PROMPTS_FILE}; sample the prompts again")
        files[prompt, counts[prompt]] = file
        counts[prompt] += 1
    return files


def copy_sample(source: Path, target: Path) -> None:
    """Copy a sample without what its file says about itself, such as how and with which weights it was sampled.

    Pixels do not change: the packets of a video are copied, and an image is written again without loss.

    Raises:
      DecodeError: If the file is damaged.
    """
    if source.suffix.lower() == ".png":
        replace(decode(source), caption="").save(target)
        return
    # The version of the program that wrote a file would distinguish a sample from its degraded copy; files of
    # `Clip.save` have none. The index of an mp4 comes first, so that a browser plays it before all is loaded.
    options = {"fflags": "+bitexact"}
    if source.suffix.lower() == ".mp4":
        options["movflags"] = "+faststart"
    try:
        with av.open(str(source)) as container, av.open(str(target), "w", options=options) as output:
            stream = container.streams.video[0]
            copy = output.add_stream_from_template(stream)
            copy.metadata.clear()
            for packet in container.demux(stream):
                if packet.dts is not None:  # the last packet is empty
                    packet.stream = copy
                    output.mux(packet)
    except (av.error.FFmpegError, IndexError) as error:
        raise DecodeError(f"{source} cannot be decoded ({error}); sample it again") from error


def degrade(clip: Clip, *, seed: int) -> Clip:
    """Return a copy that everybody who looks prefers the clip to: blurred, and with noise that differs by frame."""
    generator = rng.make_generator(seed, "degraded copy")
    blurred = distort(clip, "blur", max(1.0, _BLUR * min(clip.height, clip.width)), generator)
    return Clip(frames=distort(blurred, "noise", _NOISE, generator).frames, fps=clip.fps)
