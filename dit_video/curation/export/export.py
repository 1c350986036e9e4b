"""Export of a data set to the formats of other projects."""

from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path, write_json, write_text
from dit_video.curation.export.contents import ExportContents
from dit_video.curation.export.croissant import CROISSANT, make_croissant
from dit_video.curation.export.data_card import CARD, make_data_card
from dit_video.curation.export.registry import EXPORT_FORMATS


def export_clips(contents: ExportContents, destination: Path, format: str) -> None:
    """Write clips in a format of another project, with a data card and a description in Croissant.

    The folder is complete or absent.

    Args:
      contents: the clips.
      destination: folder, which is created; it may exist if it is empty.
      format: name of the format.

    Raises:
      UserError: an unknown format; a folder that is not empty or cannot be written; clips whose files would clash.
    """
    if format not in EXPORT_FORMATS:
        raise UserError(f"to={format!r} is invalid: there is no such format. Use {', '.join(EXPORT_FORMATS)}.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"destination={destination} is not an empty folder. Use another one, or remove it.")
    chosen = EXPORT_FORMATS[format]
    try:
        with atomic_path(destination) as folder:
            folder.mkdir()
            files = chosen.write(contents, folder)
            write_json(folder / CROISSANT, make_croissant(contents, folder, texts=chosen.texts))
            write_text(folder / CARD, make_data_card(contents, chosen.title, files))
    except OSError as error:
        fix = "Use a folder with more space, or fewer clips (--where, --splits)"
        raise UserError(f"{destination} cannot be written: {error.strerror or error}. {fix}.") from error
