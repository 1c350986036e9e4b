"""The bars and tables of a run's time: shares add up, groups hold their parts, and attempts have theirs."""

import itertools
import re
from html import unescape

import pytest

from dit_video.apps.reports.run_times import (
    describe_category,
    format_duration,
    list_attempts,
    list_parts,
    render_run_times,
)
from dit_video.training.goodput import RunTimes, read_run_times
from support.attempts import write_attempt


@pytest.fixture
def times(tmp_path) -> RunTimes:
    """Return the times of a run that was killed once and then continued."""
    write_attempt(tmp_path, 1, 1000, 0, 60, compile=30, save=2, slow_host="<node2>")
    write_attempt(tmp_path, 2, 1300, 40, 100, compile=4, restore=5, hook__validate=3, hook__mine=2, ending="stopped")
    return read_run_times(tmp_path)


def test_the_parts_of_a_bar_follow_each_other_and_fill_it(times):
    parts = [part for part in list_parts(times.microseconds) if part.colour]
    assert [part.label for part in parts] == [
        "training steps that were kept",
        "compilation",
        "checkpoints",
        "monitoring",
        "start of processes, opening data",
        "restarts",
    ]
    assert len({part.colour for part in parts}) == len(parts)
    assert parts[0].start == 0
    for part, following in itertools.pairwise(parts):
        assert following.start == pytest.approx(part.start + part.share)
    assert parts[-1].start + parts[-1].share == pytest.approx(1)


def test_a_group_is_followed_by_its_parts(times):
    labels = [(part.label, bool(part.colour)) for part in list_parts(times.microseconds)]
    monitoring = labels.index(("monitoring", True))
    assert labels[monitoring + 1 : monitoring + 3] == [("validation", False), ("mine", False)]
    restarts = labels.index(("restarts", True))
    assert labels[restarts + 1 :] == [("not running", False), ("steps that were taken again", False)]
    assert list_parts({}) == ()


def test_attempts_are_drawn_on_one_scale(times):
    first, second = list_attempts(times)
    assert (first.kept_steps, first.lost_steps, first.ending, first.idle) == (40, 20, "killed", "")
    assert (second.kept_steps, second.lost_steps, second.ending, second.idle) == (60, 0, "stopped", "3 min")
    assert first.goodput == 40 / 102
    assert sum(part.share for part in first.parts) == pytest.approx(1)  # it is the longest
    assert sum(part.share for part in second.parts) == pytest.approx(84 / 102)


def test_the_newest_of_many_attempts_are_shown(tmp_path):
    for number in range(1, 71):
        write_attempt(tmp_path, number, 100 * number, number - 1, number)
    times = read_run_times(tmp_path)
    rows = list_attempts(times)
    assert [row.number for row in rows] == list(range(21, 71))
    assert [row.ending for row in rows[-2:]] == ["killed", "no end yet"]
    assert "The newest 50 of 70 attempts." in render_run_times(times)


def test_the_page_has_the_figures(times):
    text = " ".join(unescape(re.sub("<(?!node2)[^>]*>", " ", render_run_times(times))).split())
    assert "6 min from the first start to the newest record, in 2 attempts" in text
    assert "training steps that were kept 2 min 26.0 %" in text
    assert "steps that were taken again 20 s 5.2 %" in text
    assert "not running for 3 min" in text
    assert "Process 2 (<node2>) was slow in attempt 1, from step 60 on" in text
    assert "&lt;node2&gt;" in render_run_times(times)
    single = RunTimes(attempts=times.attempts[:1], microseconds=times.attempts[0].microseconds)
    assert '<table class="attempts">' in render_run_times(times)
    assert '<table class="attempts">' not in render_run_times(single)


def test_durations_and_names_for_readers():
    texts = [format_duration(seconds) for seconds in (0.0, 4e-4, 0.04, 0.2, 9.96, 45.0, 600.0, 3600.0, 12e3, 19e4)]
    assert texts == ["0 s", "1 ms", "40 ms", "0.2 s", "10.0 s", "45 s", "10 min", "1 h", "3 h 20 min", "2 days 4 h"]
    assert describe_category("stage/latents") == "stage latents"
    assert describe_category("hook/mine") == "mine"
