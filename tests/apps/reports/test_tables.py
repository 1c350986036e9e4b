import re

import pytest

from dit_video.apps.reports.tables import format_value, render_json, render_metrics


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
