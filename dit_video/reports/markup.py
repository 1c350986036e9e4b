"""HTML in which text cannot become markup: every plain string is escaped, only `Markup` is not."""

import html

_VOID = frozenset({"img", "meta", "link", "br", "hr"})


class Markup(str):
    """HTML that is known to be safe."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """`text` as HTML; `Markup` stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(text, quote=True))


def join(*children: str | None) -> Markup:
    """Children one after the other; `None` is left out."""
    return Markup("".join(escape(child) for child in children if child is not None))


def element(tag: str, /, *children: str | None, **attributes: str | int | float | bool | None) -> Markup:
    """`<tag attributes>children</tag>`.

    An attribute's name has `-` for `_` and loses a trailing `_` (`class_`); `True` is an attribute without a value,
    `False` and `None` leave it out.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{html.escape(str(value), quote=True)}"')
    start = f"<{tag}{''.join(written)}>"
    return Markup(start if tag in _VOID else f"{start}{join(*children)}</{tag}>")
