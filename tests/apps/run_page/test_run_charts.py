"""Charts of a log: long ones are thinned without losing what is not finite, and diffusion times are in order."""

import math
import re

import pytest

from dit_video.apps.run_page.run_charts import draw_losses, draw_others, draw_throughput
from dit_video.apps.run_page.run_state import RunReader
from support.run_folders import write_config, write_entries


def read(run, entries):
    write_config(run)
    for step, values in entries:
        write_entries(run, step, **values)
    return RunReader(run).read().trainings[1]


def get_points(chart):
    return [len(match.split()) for match in re.findall(r'<polyline points="([^"]*)" class="line', chart.svg)]


def test_a_long_log_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_video.apps.run_page.run_charts._MAX_POINTS", 10)
    training = read(tmp_path, [(step, {"loss": None if step > 90 else 1.0 + (step % 2)}) for step in range(1, 101)])
    chart = draw_losses(training)[0]
    assert get_points(chart) == [9]
    assert "1 not finite" in chart.svg  # the last bin, of the steps from 91 on
    assert re.search(r"training <b>1\.5</b>", chart.svg)


def test_losses_are_shown_over_hours_too(tmp_path):
    write_config(tmp_path)
    write_entries(tmp_path, 0, 10, 20, pace=720.0)
    write_entries(tmp_path, 30, unix_seconds=None)
    chart = draw_losses(RunReader(tmp_path).read().trainings[1])[1]
    assert chart.key == "hours"
    assert get_points(chart) == [3]
    ticks = re.findall(r'class="axis middle">([^<]+)<', chart.svg)
    assert (ticks[0], ticks[-1]) == ("0", "4")  # 20 steps of 12 minutes


def test_curves_of_diffusion_times_and_their_profile_are_in_order(tmp_path):
    losses = {"loss_t0.5-1": 1.0, "loss_t0-0.25": 4.0, "loss_t0.25-0.5": 2.0, "loss_tx-y": 1.0, "loss_t1-0": 1.0}
    charts = {chart.key: chart for chart in draw_losses(read(tmp_path, [(10, losses), (20, losses)]))}
    names = re.findall(r"</span>([^<]+) <b>", charts["times"].svg)
    assert names == ["0 to 0.25", "0.25 to 0.5", "0.5 to 1"]
    assert list(charts) == ["loss", "hours", "times", "profile"]
    (points,) = re.findall(r'<polyline points="([^"]*)" class="line', charts["profile"].svg)
    x, y = zip(*[map(float, point.split(",")) for point in points.split()], strict=True)
    assert list(x) == sorted(x)
    assert list(y) == sorted(y)  # downwards: the loss falls with time
    assert "diffusion time" in charts["profile"].svg


def test_a_profile_needs_values(tmp_path):
    charts = draw_losses(read(tmp_path, [(10, {"loss_t0-0.5": None, "loss_t0.5-1": None})]))
    assert [chart.key for chart in charts] == ["loss", "hours", "times"]


def test_every_value_has_a_chart_and_times_have_none(tmp_path):
    values = {"gradient_norm": 1.0, "evaluation_sharpness": 2.0, "validate_seconds": 1.0, "mfu": 0.25}
    training = read(tmp_path, [(10, values), (20, {**values, "late": 3.0})])
    assert [chart.title for chart in draw_others(training)] == ["gradient_norm", "evaluation_sharpness", "late"]
    speeds = draw_throughput(training)
    assert [chart.key for chart in speeds] == ["steps_per_second", "mfu", "data_wait"]
    assert "<b>25</b>" in speeds[1].svg
    assert math.isclose(training.entries[0]["mfu"], 0.25)


@pytest.mark.parametrize("count", [0, 1])
def test_logs_of_no_or_one_entry_have_charts(tmp_path, count):
    training = read(tmp_path, [(10, {})][:count])
    assert [chart.key for chart in draw_losses(training)] == ["loss", "hours"][: 2 * count]
