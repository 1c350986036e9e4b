"""HTML construction in which text cannot become markup: every string that is not `Markup` is escaped."""

import html

_VOID = frozenset({"img", "meta", "link", "br", "hr"})


class Markup(str):
    """HTML that is known to be safe."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Return `text` as HTML; `Markup` is returned unchanged."""
    return text if isinstance(text, Markup) else Markup(html.escape(text, quote=True))


def join(*children: str | None) -> Markup:
    """Return the concatenated children; `None` is omitted."""
    return Markup("".join(escape(child) for child in children if child is not None))


def element(tag: str, /, *children: str | None, **attributes: str | int | float | bool | None) -> Markup:
    """Return `<tag attributes>children</tag>`.

    In an attribute's name `_` becomes `-`, and a trailing `_` is removed (`class_`). `True` gives an attribute
    without a value; `False` and `None` omit the attribute.
    """
    attribute_text = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        attribute_text.append(f" {key}" if value is True else f' {key}="{html.escape(str(value), quote=True)}"')
    opening = f"<{tag}{''.join(attribute_text)}>"
    return Markup(opening if tag in _VOID else f"{opening}{join(*children)}</{tag}>")
