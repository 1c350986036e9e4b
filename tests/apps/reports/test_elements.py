"""Elements of pages: charts, tables, and templates in which text cannot become markup."""

import re

import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from dit_video.apps.reports import Chart, Curve
from dit_video.apps.reports.elements import (
    compute_linear_ticks,
    compute_log_ticks,
    draw_line_chart,
    format_number,
    format_value,
    render_json,
    render_metrics,
    render_template,
    smooth,
)
from support.html_page import HOSTILE, Page


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-1.2, 1.1, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3]),
        (0, 2999, [0, 1000, 2000]),
    ],
)
def test_linear_ticks_are_round_numbers(low, high, expected):
    np.testing.assert_allclose(compute_linear_ticks(low, high), expected, atol=1e-12)


def test_log_ticks_are_round_numbers_and_few():
    np.testing.assert_allclose(compute_log_ticks(0.01, 0.3), [0.01, 0.02, 0.05, 0.1, 0.2])
    np.testing.assert_allclose(compute_log_ticks(1e-4, 1.0), [1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert len(compute_log_ticks(1e-30, 1.0)) <= 8


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00123456, "0.001235"), (3000, "3000"), (12_000, "12k"), (12_340_000, "12.34M"), (-1.5, "-1.5")],
)
def test_numbers_are_formatted_with_four_digits_and_units(value, text):
    assert format_number(value) == text


def test_smoothing_keeps_lines_and_lowers_noise():
    line = np.linspace(5.0, 1.0, 200)
    np.testing.assert_allclose(smooth(line)[10:-10], line[10:-10])
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(noise).std() < 0.3
    few = np.array([3.0, 1.0, 2.0])
    np.testing.assert_array_equal(smooth(few), few)


def draw(steps, values):
    curve = Curve(name="train", steps=tuple(steps), values=tuple(values))
    return draw_line_chart(Chart(title="loss", curves=(curve,)))


def polyline(svg, kind):
    points = re.search(rf'<polyline points="([^"]*)" class="{kind} c0"', svg).group(1)
    return np.array([[float(value) for value in point.split(",")] for point in points.split()])


def test_a_falling_loss_falls_on_the_page():
    svg = draw(range(1, 101), (1 / step for step in range(1, 101)))
    points = polyline(svg, "raw")
    assert (np.diff(points[:, 0]) > 0).all()
    assert (np.diff(points[:, 1]) > 0).all()
    assert "log scale" in svg


def test_the_axis_is_linear_within_a_decade_and_with_values_below_zero():
    assert "log scale" not in draw((1, 2), (1.0, 2.0))
    assert "log scale" not in draw((1, 2), (-100.0, 200.0))


def test_long_curves_are_averaged_in_bins():
    steps = np.arange(10_001)
    points = polyline(draw(steps.tolist(), np.ones(10_001).tolist()), "raw")
    assert len(points) == 400
    assert np.ptp(points[:, 1]) == 0


def test_constant_and_single_values_are_drawn():
    for steps, values in [((1,), (0.0,)), ((0, 1), (0.0, 0.0)), ((5, 5), (1.0, 1.0))]:
        svg = draw(steps, values)
        assert np.isfinite(polyline(svg, "line")).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (3000, "3\u202f000"),
        (0.98765, "0.9877"),
        ([0.5, 0.75], "0.5, 0.75"),
        ("flow", "flow"),
        (float("nan"), "nan"),
    ],
)
def test_values_are_formatted_readably(value, text):
    assert format_value(value) == text


def test_groups_with_the_same_names_are_one_table():
    table = render_metrics(
        {"following": {"seen": {"colour": 1.0, "shape": 0.5}, "unseen": {"colour": 0.9, "shape": 0.4}}}
    )
    assert table.count("<table>") == 1
    assert re.findall(r'<th scope="col">(\w+)', table) == ["colour", "shape"]
    assert re.findall(r'<th scope="row">(\w+)', table) == ["seen", "unseen"]


def test_other_groups_stand_under_headings():
    table = render_metrics({"steps": 3, "a": {"b": {"x": 1}, "c": {"y": 2}, "d": 4}})
    assert table.count("<table>") == 4
    assert re.findall(r"<h(\d)>(\w+)", table) == [("3", "a"), ("4", "b"), ("4", "c")]


def test_empty_groups_make_no_table():
    assert "<table>" not in render_metrics({"a": {}, "b": {}})


def test_json_marks_keys_only():
    block = render_json({"width": 192, "name": 'a "key": <b>'})
    assert re.findall(r'<span class="key">&#34;(\w+)', block) == ["width", "name"]
    assert "&lt;b&gt;" in block


CLIP = {"is_video": False, "classes": "media", "source": "data:,", "width": 3, "height": 2, "shown_width": 6}


def test_text_cannot_become_markup():
    page = Page(render_template("clip.html.jinja", label=HOSTILE, **CLIP))
    ((tag, attributes),) = page.elements
    assert tag == "img"
    assert attributes["alt"] == attributes["title"] == HOSTILE
    assert not page.find("script")


def test_rendered_templates_are_not_escaped_again():
    assert isinstance(render_template("clip.html.jinja", label="a & b", **CLIP), Markup)


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="label"):
        render_template("clip.html.jinja", **CLIP)
