"""HTML from the templates of this folder, in which text cannot become markup: jinja2 escapes every other string."""

import importlib.resources
from typing import Any

import jinja2
from markupsafe import Markup

_FOLDER = importlib.resources.files("dit_video.apps.reports")


def make_environment(package: str) -> jinja2.Environment:
    """Return an environment for the folder `templates` of a package, in which text cannot become markup."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


_ENVIRONMENT = make_environment("dit_video.apps.reports")


def render_template(name: str, **values: Any) -> Markup:
    """Return the rendered template; functions among `values` can be called in it."""
    return Markup(_ENVIRONMENT.get_template(name).render(values))


def read_asset(name: str) -> Markup:
    """Return a style sheet or script of this folder, for a page to contain."""
    return Markup(_FOLDER.joinpath(name).read_text(encoding="utf-8"))


_ENVIRONMENT.globals["read_asset"] = read_asset
