from dit_video.reports.markup import Markup, element, escape, join


def test_text_is_escaped_and_markup_is_not():
    assert escape("<b> & \"'") == "&lt;b&gt; &amp; &quot;&#x27;"
    assert escape(Markup("<b>")) == "<b>"
    assert join("<", None, Markup("<br>")) == "&lt;<br>"


def test_elements_are_written_with_their_attributes():
    assert element("p", "a<b", element("b", "c"), class_="x", data_wrong=True, hidden=False, id=None) == (
        '<p class="x" data-wrong>a&lt;b<b>c</b></p>'
    )
    assert element("img", alt='"', width=3) == '<img alt="&quot;" width="3">'
    assert element("meta", name="viewport") == '<meta name="viewport">'
