"""Tables of nested metrics, and configs as readable JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dit_video.reports.charts import format_number
from dit_video.reports.markup import Markup, element, escape, join


def render_metrics(metrics: Mapping[str, Any]) -> Markup:
    """Return one panel for the scalars at the top level, and one for each group."""
    scalars = {name: value for name, value in metrics.items() if not isinstance(value, Mapping)}
    panels = [element("div", _render_tables(scalars, 4), class_="panel")] if scalars else []
    for name, group in metrics.items():
        if isinstance(group, Mapping):
            panels.append(element("div", element("h3", name), _render_tables(group, 4), class_="panel"))
    return element("div", *panels, class_="metrics")


def _render_tables(metrics: Mapping[str, Any], level: int) -> Markup:
    """Return scalars as rows of two columns, groups with the same names as one table, and others under headings."""
    scalars = {name: value for name, value in metrics.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    parts = []
    if scalars:
        rows = [element("tr", element("th", name, scope="row"), _render_cell(value)) for name, value in scalars.items()]
        parts.append(_render_table(None, rows))
    if len(groups) > 1 and _have_same_names(list(groups.values())):
        parts.append(_render_matrix(groups))
    else:
        parts += [
            join(element(f"h{min(level, 6)}", name), _render_tables(group, level + 1)) for name, group in groups.items()
        ]
    return join(*parts)


def format_value(value: Any) -> str:
    """Return a metric's value as text: numbers with four digits, a sequence with commas, `None` as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(format_value(item) for item in value)
    return str(value)


def render_json(value: Any) -> Markup:
    """Return indented JSON with highlighted keys."""
    text = escape(json.dumps(value, indent=2, ensure_ascii=False))
    keyed = re.sub(r"^( *)(&quot;.*?&quot;)(?=: )", r'\1<span class="key">\2</span>', text, flags=re.MULTILINE)
    return element("pre", Markup(keyed), tabindex="0")


def _have_same_names(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the groups are flat and have the same names, so that the names can head columns."""
    flat = not any(isinstance(value, Mapping) for group in groups for value in group.values())
    return flat and bool(groups[0]) and all(group.keys() == groups[0].keys() for group in groups)


def _render_matrix(groups: Mapping[str, Mapping[str, Any]]) -> Markup:
    columns = list(next(iter(groups.values())))
    head = element("tr", element("td"), *(element("th", column, scope="col") for column in columns))
    rows = [
        element("tr", element("th", name, scope="row"), *(_render_cell(group[column]) for column in columns))
        for name, group in groups.items()
    ]
    return _render_table(head, rows)


def _render_table(head: Markup | None, rows: Sequence[Markup]) -> Markup:
    body = element("tbody", *rows)
    table = element("table", element("thead", head) if head is not None else None, body)
    return element("div", table, class_="scroll", tabindex="0")


def _render_cell(value: Any) -> Markup:
    numeric = isinstance(value, int | float) or (isinstance(value, Sequence) and not isinstance(value, str))
    return element("td", format_value(value), class_="number" if numeric else None)
