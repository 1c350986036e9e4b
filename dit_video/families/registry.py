"""The registry of open model families."""

from pathlib import Path

from dit_video.core import registry
from dit_video.core.errors import UserError
from dit_video.families.dit.pipeline import DitFamily
from dit_video.families.family import Family, read_pipeline_class
from dit_video.families.ltx.pipeline import LtxFamily
from dit_video.families.vace.pipeline import VaceFamily
from dit_video.families.wan.pipeline import WanFamily

# VACE comes first, because its models' configs are also Wan configs.
_FAMILIES: list[Family] = [VaceFamily(), WanFamily(), DitFamily(), LtxFamily()]


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
