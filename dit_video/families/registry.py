"""The registry of open model families."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from dit_video.core import registry
from dit_video.core.errors import MissingError, UserError
from dit_video.families.dit.pipeline import DitFamily
from dit_video.families.family import INDEX, Family, read_pipeline_class
from dit_video.families.ltx.pipeline import LtxFamily
from dit_video.families.vace.pipeline import VaceFamily
from dit_video.families.wan.pipeline import WanFamily
from dit_video.sampling.pipeline_config import CONFIG, RUN_CONFIG
from dit_video.weights.safetensors import load_shapes

# VACE comes first, because its models' configs are also Wan configs.
_FAMILIES: list[Family] = [VaceFamily(), WanFamily(), DitFamily(), LtxFamily()]
_EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
"""A pipeline on the hub, to name where nothing is known of the model."""
_OTHER_LAYOUTS = {"high_noise_model", "low_noise_model", "diffusion_models"}
"""Folders of the layouts of Wan's authors and of ComfyUI."""


def register_family(family: Family) -> None:
    """Add a family from another package; it replaces a family of the same name.

    The user's own code calls this, or a module that an installed package names with an entry point of the group
    `dit_video`. If its denoisers have their own config class, that class is registered with `register`.
    """
    _FAMILIES[:] = [family, *(each for each in _FAMILIES if each.name != family.name)]


def find_family(folder: Path) -> Family | None:
    """Return the family of a pipeline's folder; None if it belongs to no known family and has no `model_index.json`.

    Raises:
      UserError: If no family has the pipeline's class.
    """
    families = list_families()
    family = next((each for each in families if each.is_pipeline(folder)), None)
    if family is None and (name := read_pipeline_class(folder)) is not None:
        classes = ", ".join(each for one in families for each in one.pipeline_classes)
        raise UserError(f"{folder} holds a pipeline of class {name}; known here: {classes}")
    return family


def list_families() -> tuple[Family, ...]:
    """Return all families, the last registered first."""
    registry.load_entry_points()
    return tuple(_FAMILIES)


def check_folder(path: Path) -> None:
    """Check that the folder of a run, a pipeline or open weights exists.

    Raises:
      MissingError: If there is nothing at the path.
      UserError: If it is a file; the message says of which family, and which pipeline to load instead.
    """
    if path.is_file():
        fix = "name the folder of a run, or of a pipeline in the layout of diffusers"
        if (found := _recognize(path, [path])) is None:
            raise UserError(f"{path} is a file; {fix}")
        raise UserError(f"{path} is a file with weights of the family {found[0]}; {fix}, such as {found[1]}")
    if not path.is_dir():
        raise MissingError(f"no such run: {path}")


def _recognize(path: Path, files: Iterable[Path]) -> tuple[str, str] | None:
    """Return the name of the family whose weights lie in files, and what to load instead; None if none knows them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with contextlib.suppress(UserError):  # pickled or damaged
            shapes |= load_shapes(file)
    recognized = ((each.name, each.recognize(path, shapes)) for each in list_families())
    return next(((name, model) for name, model in recognized if model is not None), None)


def make_unknown_error(folder: Path) -> UserError:
    """Return the error for a folder that holds neither a run nor a pipeline, which says what it seems to hold."""
    return UserError(f"{folder} holds neither {CONFIG} nor {RUN_CONFIG} nor {INDEX}; {_find_fix(folder)}")


def _find_fix(folder: Path) -> str:
    """Return what to do about a folder that is neither a run nor a pipeline."""
    names = {path.name for path in folder.iterdir()}
    if (folder.parent / INDEX).is_file():
        return f"it is a part of a pipeline: name {folder.parent}"
    endings = (".pt", ".pth") if "config.json" in names else (".pt", ".pth", ".safetensors")
    has_files = any(name.endswith(endings) for name in names) or {"config.json", "configuration.json"} <= names
    if has_files or _OTHER_LAYOUTS & {folder.name, *names}:
        rule, model = "it seems to be in the layout of the model's authors, or of ComfyUI", _EXAMPLE
        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*/*.safetensors"))
        if (found := _recognize(folder, weights)) is not None:
            rule, model = f"{rule}, with weights of the family {found[0]}", found[1]
        return f"{rule}: name the folder that diffusers reads, such as {model}"
    if "config.json" in names:
        return "it is one model without its pipeline: name the folder of a whole pipeline"
    return "name a run or open weights"
