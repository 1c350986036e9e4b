"""Tables of nested metrics, and configs as readable JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from dit_video.apps.reports.charts import format_number
from dit_video.apps.reports.template import render_template


def render_metrics(metrics: Mapping[str, Any]) -> Markup:
    """Return one panel for the scalars at the top level, and one for each group."""
    return render_template(
        "metrics.html.jinja",
        metrics=metrics,
        split=_split,
        have_same_names=_have_same_names,
        format_value=format_value,
    )


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
    text = str(escape(json.dumps(value, indent=2, ensure_ascii=False)))
    keyed = re.sub(r"^( *)(&#34;.*?&#34;)(?=: )", r'\1<span class="key">\2</span>', text, flags=re.MULTILINE)
    return Markup(f'<pre tabindex="0">{keyed}</pre>')


def _split(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Return the scalars, and the groups."""
    groups = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    return {name: value for name, value in metrics.items() if name not in groups}, groups


def _have_same_names(groups: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether several groups are flat and have the same names, so that the names can head columns."""
    first, *others = groups.values() or ({},)
    flat = not any(isinstance(value, Mapping) for group in groups.values() for value in group.values())
    return flat and bool(first and others) and all(group.keys() == first.keys() for group in others)
