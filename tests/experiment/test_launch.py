"""Start of a run from a script."""

import errno
import os

import pytest

from dit_video.core.errors import UserError
from dit_video.experiment.launch import open_run


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ESTALE, 75), (errno.EIO, 75), (errno.ENOSPC, 2), (errno.EDQUOT, 2), (errno.EACCES, 2)]
)
def test_errors_of_a_disk_have_the_codes_of_storage(tiny, tmp_path, number, code):
    """A log may fail where checkpoints do not; a launcher starts a run again after 75 and not after 2."""
    with pytest.raises(UserError, match="the disk") as error, open_run(tmp_path / "run", tiny.EXPERIMENT):
        raise OSError(number, os.strerror(number))
    assert error.value.code == code


def test_other_errors_stay_as_they_are(tiny, tmp_path):
    with pytest.raises(FileNotFoundError), open_run(tmp_path / "run", tiny.EXPERIMENT):
        (tmp_path / "nothing").read_text()
