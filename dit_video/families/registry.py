"""The open model families that are known here."""

from dit_video.core import registry
from dit_video.families.dit.family import DitFamily
from dit_video.families.family import Family
from dit_video.families.wan.family import WanFamily

_FAMILIES: list[Family] = [WanFamily(), DitFamily()]


def register_family(family: Family) -> None:
    """Add a family of another package, which takes the place of one of the same name.

    It is called by the user's own code, or by a module that an installed package names with an entry point of the group
    `dit_video`. The config of its denoisers, if it is a class of its own, is registered with `register`.
    """
    _FAMILIES[:] = [family, *(each for each in _FAMILIES if each.name != family.name)]


def list_families() -> tuple[Family, ...]:
    """Return all families, those that were registered last first."""
    registry.load_entry_points()
    return tuple(_FAMILIES)
