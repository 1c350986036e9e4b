"""The registry of open model families."""

from pathlib import Path

from dit_video.core import registry
from dit_video.core.errors import MissingError, UserError
from dit_video.families.dit.pipeline import DitFamily
from dit_video.families.family import INDEX, Family, read_pipeline_class
from dit_video.families.ltx.pipeline import LtxFamily
from dit_video.families.vace.pipeline import VaceFamily
from dit_video.families.wan.pipeline import WanFamily
from dit_video.sampling.pipeline_config import CONFIG, RUN_CONFIG

# VACE comes first, because its models' configs are also Wan configs.
_FAMILIES: list[Family] = [VaceFamily(), WanFamily(), DitFamily(), LtxFamily()]
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
      UserError: If it is a file.
    """
    if path.is_file():
        raise UserError(f"{path} is a file; name the folder of a run, or of a pipeline in the layout of diffusers")
    if not path.is_dir():
        raise MissingError(f"no such run: {path}")


def make_unknown_error(folder: Path) -> UserError:
    """Return the error for a folder that holds neither a run nor a pipeline, which says what it seems to hold."""
    return UserError(f"{folder} holds neither {CONFIG} nor {RUN_CONFIG} nor {INDEX}; {_find_fix(folder)}")


def _find_fix(folder: Path) -> str:
    """Return what to do about a folder that is neither a run nor a pipeline."""
    names = {path.name for path in folder.iterdir()}
    if (folder.parent / INDEX).is_file():
        return f"it is a part of a pipeline: name {folder.parent}"
    endings = (".pth",) if "config.json" in names else (".pth", ".safetensors")
    has_files = any(name.endswith(endings) for name in names) or {"config.json", "configuration.json"} <= names
    if has_files or _OTHER_LAYOUTS & {folder.name, *names}:
        return (
            "it seems to be in the layout of the model's authors, or of ComfyUI: name the folder that diffusers reads, "
            "such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    if "config.json" in names:
        return "it is one model without its pipeline: name the folder of a whole pipeline"
    return "name a run or open weights"
