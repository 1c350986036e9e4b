import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from dit_video.apps.reports.template import render_template
from support.html_page import HOSTILE, Page

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
