"""Samples of several systems, matched by their prompts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dit_video.core.errors import MissingError, UserError
from dit_video.evaluation.samples import PROMPTS_FILE, list_samples

SUFFIXES = (".mp4", ".webm", ".png")
"""Suffixes of files that a page can hold."""
_MAX_NAMED = 3
"""Maximum number of prompts that an error names."""


class PromptSamples(NamedTuple):
    """The samples of all systems for a prompt."""

    prompt: str
    files: Mapping[str, Path]
    """File of each system's sample."""


def name_systems(folders: Sequence[Path], names: Sequence[str] = ()) -> dict[str, Path]:
    """Return the folders of samples by the names of their systems: by default the folder's name if names differ.

    Raises:
      UserError: fewer than two folders, another number of names than of folders, or a name or a folder twice.
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
      folders: folder of each system's samples, with `prompts.json`.

    Raises:
      MissingError: a folder without `prompts.json`, or a sample's file that does not exist.
      UserError: a damaged list, or prompts that not all systems have.
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
