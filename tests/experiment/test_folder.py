"""The folder of a run is opened only where it holds a run of this version."""

import json

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.experiment.run import Run


def test_a_folder_with_other_files_is_refused_and_left_alone(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        Run.create(tmp_path, tiny.EXPERIMENT)
    with pytest.raises(UserError, match="is a file"):
        Run.create(tmp_path / "thesis.tex", tiny.EXPERIMENT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_rendered_clips_may_lie_in_a_new_run_s_folder(tiny, tmp_path):
    (tmp_path / "clips").mkdir()
    Run.create(tmp_path, tiny.EXPERIMENT)
    assert (tmp_path / "experiment.json").is_file()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"format": 0, "experiment": {}}, "run of format 0, this version reads 1"),
        ([], "run of format None"),
        ({"format": 1}, "holds no experiment"),
        ({"format": 1, "experiment": {"type": "os:system", "command": "x"}}, "lies outside dit_video"),
        ({"format": 1, "experiment": {"type": "dit_video.sampling:Sampling"}}, "holds no experiment"),
        ({"format": 1, "experiment": {"type": "dit_video.experiment:Gone"}}, "does not exist in this version"),
        ({"format": 1, "experiment": {"type": "dit_video.experiment:DataConfig", "pixels": 1}}, "no field pixels"),
    ],
)
def test_another_version_s_run_is_refused(tmp_path, document, message):
    (tmp_path / "experiment.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as error:
        Run.open(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(MissingError, match="no such run"):
        Run.open(tmp_path / "nowhere")


# Clips.
