"""Templates of HTML pages."""

import importlib.resources

import jinja2
from markupsafe import Markup


def make_environment(package: str) -> jinja2.Environment:
    """Return an environment for a package's folder `templates`, in which text cannot become markup.

    In a template, `read_asset(name)` gives the content of a style sheet or script next to that folder.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = importlib.resources.files(package)
    environment.globals["read_asset"] = lambda name: Markup(folder.joinpath(name).read_text(encoding="utf-8"))
    return environment
