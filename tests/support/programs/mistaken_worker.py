"""A worker in which every inspection fails with an error that a user can act on."""

from dit_video.core.errors import UserError
from dit_video.data.ingest import inspection, worker


def screen(*_):
    """Fail."""
    raise UserError("nothing works here")


inspection.Screening.screen = screen
worker.main()
