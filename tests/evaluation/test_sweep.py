"""Sweeps of steps and guidance: a result for each point, reused, on a page with quality against cost."""

import json

import pytest

from dit_video.apps.reports.comparison_report import write_sweep_report
from dit_video.core.errors import UserError
from dit_video.evaluation.evaluate import SAMPLES_FOLDER
from dit_video.evaluation.metrics.frames import Sharpness
from dit_video.evaluation.metrics.reconstruction import Psnr
from dit_video.evaluation.protocol import ReconstructionProtocol
from dit_video.evaluation.sweep import COST_FILE, sweep_sampling
from dit_video.scenes.protocols import SceneProtocol
from dit_video.tokens import Grid
from support import tiny_pipeline

PROTOCOL = SceneProtocol(name="scenes", metrics=(Sharpness(),), count=2, sizes=(Grid(5, 32, 32),))


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline.make_pipeline(tiny_pipeline.read_captions_of_scenes(tiny_pipeline.make_config(steps=1)))


def test_every_point_has_its_values_and_its_cost(pipeline, tmp_path):
    arguments = {"steps": (1, 2), "guidance": (1.0, 3.0)}
    announced = []
    sweep = sweep_sampling(
        pipeline, PROTOCOL, tmp_path, **arguments, on_point=lambda count, scale: announced.append((count, scale))
    )
    assert announced == [(1, 1.0), (2, 1.0), (1, 3.0), (2, 3.0)]
    assert [(point.steps, point.guidance) for point in sweep.points] == announced
    assert all(point.seconds > 0 for point in sweep.points)
    values = [each.value for each in sweep.comparison.values["sharpness"]]
    assert len(set(values)) == 4
    record = json.loads((tmp_path / "steps_2_guidance_3" / "metrics.json").read_text())
    sampling = record["protocol"]["sampling"]
    assert (sampling["steps"], sampling["guidance"]["scales"]) == (2, {"text": 3})
    cost = tmp_path / "steps_2_guidance_3" / COST_FILE
    cost.write_text('{"seconds": 123.0}')
    again = sweep_sampling(pipeline, PROTOCOL, tmp_path, **arguments)
    assert again.points[-1].seconds == 123
    assert again.comparison == sweep.comparison
    write_sweep_report(tmp_path / "report.html", sweep, title="Sweep")
    page = (tmp_path / "report.html").read_text()
    assert "guidance 3" in page
    assert "2 steps, guidance 3" in page
    assert "unknown" not in page


def test_the_cost_of_an_interrupted_point_is_unknown(pipeline, tmp_path):
    arguments = {"steps": (1, 2), "guidance": (1.0, 3.0)}
    sweep_sampling(pipeline, PROTOCOL, tmp_path, **arguments)
    sampled, measured = tmp_path / "steps_1_guidance_1", tmp_path / "steps_2_guidance_1"
    for point in (sampled, measured):  # as if they were killed before the cost was written
        (point / COST_FILE).unlink()
    next((sampled / SAMPLES_FOLDER).glob("*.mp4")).unlink()
    again = sweep_sampling(pipeline, PROTOCOL, tmp_path, **arguments)
    assert [point.seconds is None for point in again.points] == [True, True, False, False]
    write_sweep_report(tmp_path / "report.html", again, title="Sweep")
    assert (tmp_path / "report.html").read_text().count("unknown") == 2


def test_sweeps_of_nothing_are_refused(pipeline, tmp_path):
    with pytest.raises(UserError, match="one point"):
        sweep_sampling(pipeline, PROTOCOL, tmp_path, steps=(1,), guidance=(1.0,))
    with pytest.raises(UserError, match="samples nothing"):
        sweep_sampling(
            pipeline, ReconstructionProtocol(name="r", metrics=(Psnr(),)), tmp_path, steps=(1, 2), guidance=(1.0,)
        )
