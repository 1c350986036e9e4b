"""Requests as JSON values, with pictures and noise in files beside them."""

import difflib
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import MissingError, UserError
from dit_video.core.shared_array import save_array
from dit_video.sampling.clip_recipe import hash_pixels
from dit_video.sampling.expansion import ExpandedPrompt
from dit_video.sampling.pictures import Mask, to_mask
from dit_video.sampling.request import OPTIONS, PICTURES, Condition, Request
from dit_video.tokens import Grid
from dit_video.video import Clip, decode

INPUTS_FOLDER = "inputs"
"""Folder, beside a written list, of the pictures and the noise of its requests."""
SIZE_KEYS = ("frames", "height", "width")
"""Keys of the size of a clip."""
_TYPES = {str: "a text", int: "a whole number"}
_KEYS = ("prompt", "negative", "seed", *SIZE_KEYS, *PICTURES, *OPTIONS, "strengths", "noise", "expanded_from")
SAMPLE_KEYS = ("file",)
"""Keys in lists of samples that were written: values of the sample, which a request does not have."""
_GUIDANCE_KEYS = ("guidance", "interval", "rescale", "guidance_method", "skip_layers")
_SAMPLING_KEYS = ("steps", "solver", "shift", "times", *_GUIDANCE_KEYS)
"""Keys of values that all requests have in common, because they are sampled together."""
_PYTHON_KEYS = ("conditioning", "conditioner")
"""Keys in lists of samples for values that no file holds."""
_CONDITION_KEYS = ("file", "frame", "strength", "generated")


def read_request(values: Mapping[str, Any], folder: Path, *, where: str = "") -> Request:
    """Return a request of JSON values, with its pictures and noise decoded from files in a folder.

    It has a `prompt`, and may have `frames`, `height` and `width` (all or none), `seed`, `negative`, `strengths`,
    `noise` (a file of NumPy with latents `[t h w c]`), and what `read_pictures` reads.

    Raises:
      MissingError: If the file of a picture or of noise is missing.
      DecodeError: If the file of a picture is damaged.
      UserError: If a key is unknown, or a value does not fit; `where` begins the message.
    """
    values = {"seed": 0, "negative": None, **values}
    check_mask_key(values, where)
    for name in values:
        if name not in _KEYS and name not in SAMPLE_KEYS:
            raise _make_key_error(f"{where}{name}={values[name]!r}", name)
    has_size = any(name in values for name in SIZE_KEYS)
    kinds = {"prompt": str, "seed": int} | (dict.fromkeys(SIZE_KEYS, int) if has_size else {})
    kinds |= {name: str for name in ("negative", "expanded_from") if values.get(name) is not None}
    for name, kind in kinds.items():
        if type(values.get(name)) is not kind:  # `True` is an int to isinstance
            raise UserError(f"{where}{name} must be {_TYPES[kind]}, not {values.get(name)!r}")
    strengths = _parse_strengths(values.get("strengths", {}), f"{where}strengths")
    size = Grid(*(values[name] for name in SIZE_KEYS)) if has_size else None
    fields = read_pictures(values, folder)
    for name, types in (("strength", (int, float)), ("method", (str,)), ("resample", (int,))):
        if (value := values.get(name)) is not None:
            if type(value) not in types:
                description = "a text" if str in types else "a number"
                raise UserError(f"{where}{name} must be {description}, not {value!r}")
            fields[name] = value
    if values.get("noise"):
        fields["noise"] = _read_noise(values["noise"], folder)
    prompt = values["prompt"]
    if (original := values.get("expanded_from")) is not None:
        prompt = ExpandedPrompt(prompt, original)
    return Request(prompt, size, values["seed"], values["negative"], strengths=strengths, **fields)


def _parse_strengths(values: Any, name: str) -> dict[str, float | tuple[float, ...]]:
    """Return strengths by the name of their conditioning, each a number or several; `name` begins the error."""
    if not isinstance(values, dict):
        raise UserError(f"{name} must be an object, not {values!r}")
    strengths: dict[str, float | tuple[float, ...]] = {}
    for key, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if any(type(number) not in (int, float) for number in numbers):
            raise UserError(f"{name} must be numbers or lists of numbers, not {value!r}")
        strengths[key] = tuple(map(float, numbers)) if isinstance(value, list) else float(value)
    return strengths


def _make_key_error(front: str, name: str) -> UserError:
    """Return the error for a key that a request does not have."""
    if name in _SAMPLING_KEYS:
        rule = "all requests of a list are sampled alike"
        return UserError(f"{front} is invalid: {rule}. Use --{name.replace('_', '-')} for all of them.")
    if name in _PYTHON_KEYS:
        return UserError(f"{front} is invalid: no list holds such values. Use Pipeline.generate_many in Python.")
    return UserError(f"{front} is invalid: there is no such key. Use {_find_closest(name, _KEYS)}.")


def _find_closest(name: str, names: Collection[str]) -> str:
    """Return the name that is most like another, or all names if none is."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), ", ".join(names))


def _read_noise(file: Any, folder: Path) -> Float32[np.ndarray, "t h w c"]:
    """Read initial noise from a file of `numpy.save`.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is no array of numbers `[t h w c]`.
    """
    if not isinstance(file, str):
        raise UserError(f"noise={file!r} is invalid: it must be the name of a file")
    if not (folder / file).is_file():
        raise MissingError(f"no such file: {folder / file} of noise; use a file that numpy.save wrote")
    try:
        noise = np.load(folder / file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"noise={file!r} is invalid: it is no array of NumPy ({error}). Use numpy.save") from error
    if not isinstance(noise, np.ndarray) or noise.ndim != 4 or noise.dtype.kind != "f":
        content = f"{noise.dtype} {list(noise.shape)}" if isinstance(noise, np.ndarray) else "an archive"
        raise UserError(f"noise={file!r} is invalid: it holds {content}, not real numbers [t h w c]. Use numpy.save")
    return noise.astype(np.float32)


def read_pictures(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the images, clips and masks of a request, by the names of its fields, decoded from their files.

    Args:
      values: Files by name: `image`, `last_image`, `video`, `generated` (what is white is generated; an image is a mask
        of all frames of `video`) and `control`; a list of files `reference_images`; and `conditions`, a list of
        `{"file": …, "frame": …, "strength": …, "generated": …}`; all but the file may be left out. Others are ignored.
      folder: Folder that relative paths start from.

    Raises:
      MissingError: If a file does not exist.
      DecodeError: If a file is damaged.
      UserError: If a mask has no video, or a value is no name of a file, or no list of what it should be.
    """

    def read(name: str, file: Any, frames: int | None = None) -> Clip:
        if not isinstance(file, str | Path):
            raise UserError(f"{name}={file!r} is invalid: it must be the name of a file")
        return decode(folder / file, frames=frames)

    pictures: dict[str, Any] = {}
    for name, frames in (("image", 1), ("last_image", 1), ("video", None), ("control", None)):
        if values.get(name):
            pictures[name] = read(name, values[name], frames)
    for name in ("reference_images", "conditions"):
        if not isinstance(values.get(name, ()), list | tuple):
            raise UserError(f"{name}={values[name]!r} is invalid: it must be a list")
    if files := values.get("reference_images"):
        pictures["reference_images"] = [read("reference_images", file, 1) for file in files]
    if entries := values.get("conditions"):
        pictures["conditions"] = [_make_condition(entry, read, folder) for entry in entries]
    if file := values.get("generated"):
        if "video" not in pictures:
            raise UserError(f"generated={file} is invalid without a video; give the video that it is a mask of")
        pictures["generated"] = _read_mask(file, folder)
    return pictures


def check_mask_key(values: Mapping[str, Any], where: str) -> None:
    """Refuse the key `mask`, whose meaning depended on the task; `where` begins the error.

    Raises:
      UserError: If there is such a key.
    """
    if "mask" in values:
        rule = "no mask has this name, as it could mean what is kept or what is generated"
        fix = "Use generated, white where pixels are generated; invert a mask that is white where they are kept"
        raise UserError(f"{where}mask={values['mask']!r} is invalid: {rule}. {fix}.")


def _make_condition(entry: Any, read: Callable[..., Clip], folder: Path) -> Condition:
    entry = {"frame": 0, "strength": 1.0} | entry if isinstance(entry, dict) else {}
    check_mask_key(entry, "a condition: ")
    if unknown := [name for name in entry if name not in _CONDITION_KEYS]:
        fix = _find_closest(unknown[0], _CONDITION_KEYS)
        raise UserError(f"{unknown[0]}={entry[unknown[0]]!r} of a condition is invalid: no such key. Use {fix}.")
    if type(entry.get("frame")) is not int or type(entry.get("strength")) not in (int, float):
        rule = 'it must be {"file": NAME, "frame": NUMBER, "strength": NUMBER}'
        raise UserError(f"conditions={[entry]} is invalid: {rule}")
    content = read("conditions", entry.get("file"))
    generated = _read_mask(entry["generated"], folder) if entry.get("generated") else None
    return Condition(content=content, frame=entry["frame"], strength=float(entry["strength"]), generated=generated)


def _read_mask(file: Any, folder: Path) -> Mask:
    if not isinstance(file, str | Path):
        raise UserError(f"generated={file!r} is invalid: it must be the name of a file")
    return to_mask("generated", folder / file)


def write_request(request: Request, folder: Path) -> dict[str, Any]:
    """Write the pictures and the noise of a request into a folder, and return its entry of a list in that folder.

    `read_request` returns the same request of the entry. Files are lossless, and named by their content, so that
    requests share them. Of a conditioner, and of values of further conditioning, only the names are in the entry, and
    such a list is not read again.
    """
    entry: dict[str, Any] = {"prompt": str(request.prompt)}
    if isinstance(request.prompt, ExpandedPrompt):
        entry["expanded_from"] = request.prompt.original
    if request.size is not None:
        entry |= dict(zip(SIZE_KEYS, map(int, request.size), strict=True))
    entry["seed"] = request.seed
    if request.negative is not None:
        entry["negative"] = request.negative
    if request.strengths:
        strengths = {name: np.asarray(value, float).tolist() for name, value in request.strengths.items()}
        entry["strengths"] = strengths
    for name, value in request.pictures.items():
        if name == "conditions":
            entry[name] = write_conditions(value, folder)
        elif name == "reference_images":
            entry[name] = [write_picture("reference", image, folder) for image in value]
        elif name == "generated":
            entry[name] = write_mask(value, request.video, folder)
        else:
            entry[name] = write_picture(name, value, folder)
    if request.noise is not None:
        noise = np.asarray(request.noise)
        entry["noise"] = f"{INPUTS_FOLDER}/noise-{hash_pixels(noise)}.npy"
        save_array(folder / entry["noise"], noise)
    defaults = Request("")
    entry |= {name: value for name in OPTIONS if (value := getattr(request, name)) != getattr(defaults, name)}
    if request.conditioning:
        entry["conditioning"] = sorted(request.conditioning)
    return entry if request.conditioner is None else entry | {"conditioner": type(request.conditioner).__name__}


def write_conditions(conditions: Sequence[Condition], folder: Path) -> list[dict[str, Any]]:
    """Write the pictures of conditions into a folder, and return their values in an entry."""
    return [
        {"file": write_picture("condition", each.content, folder), "frame": each.frame}
        | ({} if each.strength == 1 else {"strength": each.strength})
        | ({} if each.generated is None else {"generated": write_mask(each.generated, each.content, folder)})
        for each in conditions
    ]


def list_files(entry: Mapping[str, Any]) -> set[str]:
    """Return the names of all files in an entry of a list, which is perhaps not valid."""
    files = [entry.get(name) for name in ("file", "noise", *PICTURES)]
    conditions = [each for each in _flatten(files) if isinstance(each, dict)]
    files += [each for each in _flatten(files) if not isinstance(each, dict)]
    files += [each.get(key) for each in conditions for key in ("file", "generated")]
    return {each for each in files if isinstance(each, str)}


def _flatten(values: list[Any]) -> list[Any]:
    return [each for value in values if isinstance(value, list) for each in value]


def write_picture(name: str, clip: Clip, folder: Path) -> str:
    """Write an image or a clip without loss, and return the file's name relative to the folder."""
    digest = hashlib.blake2b(f"{hash_pixels(clip.frames)} {clip.fps}".encode(), digest_size=8).hexdigest()
    file = f"{INPUTS_FOLDER}/{name}-{digest}.{'png' if len(clip) == 1 else 'apng'}"
    if not (folder / file).exists():
        clip.save(folder / file)
    return file


def write_mask(mask: Mask, video: Clip | None, folder: Path) -> str:
    """Write a mask at a video's size, white where it is True; one frame if all are equal. Return the file's name."""
    pixels = mask[:, None, None] if mask.ndim == 1 else mask
    pixels = pixels if video is None else np.broadcast_to(pixels, video.frames.shape[:3])
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    pixels = pixels[:1] if (pixels == pixels[:1]).all() else pixels
    frames = np.where(pixels, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=-1)
    return write_picture("generated", Clip(frames, fps=1.0), folder)
