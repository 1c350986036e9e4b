"""Annotators by name. One of another package is passed to `annotate` as it is."""

from dit_video.core.errors import UserError
from dit_video.curation.annotator import AnyAnnotator
from dit_video.curation.camera_motion import MotionVectors
from dit_video.curation.captions import Captions
from dit_video.curation.clip_scores import ClipScores
from dit_video.curation.near_duplicates import Duplicates
from dit_video.curation.text_area import TextArea

ANNOTATORS: dict[str, type[AnyAnnotator]] = {
    "motion_vectors": MotionVectors,
    "clip": ClipScores,
    "duplicates": Duplicates,
    "text_area": TextArea,
    "captions": Captions,
}
"""Annotators of this package."""


def check_names(names: tuple[str, ...]) -> None:
    """Check the names of annotators.

    Raises:
      UserError: If there is no such annotator, or no name.
    """
    if not names:
        raise UserError(f"no annotator is named. Use one or more of {', '.join(ANNOTATORS)}, or --list")
    if unknown := [name for name in names if name not in ANNOTATORS]:
        raise UserError(f"annotator {unknown[0]!r} is invalid: it does not exist. Use {', '.join(ANNOTATORS)}")
