"""A strict parser of HTML pages, and a text that tries to break out of one."""

from html.parser import HTMLParser

VOID = {"img", "meta", "link", "br", "hr", "input"}
HOSTILE = "\"><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> & </style>"


class Page(HTMLParser):
    """Collects elements, and fails on a tag that isn't closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def find(self, tag, **attributes):
        """Return the attributes of the elements with this tag and these attributes."""
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]
