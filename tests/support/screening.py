"""Kept and dropped shots of a screened file."""

from dit_video.data.ingest.screening import ScreeningResult, Shot


def list_kept(screened: ScreeningResult) -> list[Shot]:
    """Return the shots that are kept."""
    return [judged.shot for judged in screened.shots if not judged.reason]


def list_dropped(screened: ScreeningResult) -> list[tuple[str, str]]:
    """Return the names of the shots that are dropped, with the reasons."""
    return [(judged.shot.name, judged.reason) for judged in screened.shots if judged.reason]
