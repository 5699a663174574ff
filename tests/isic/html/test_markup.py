from isic.html.markup import Markup, join, number, tag


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<", Markup("<br>"), title='"') == '<p title="&quot;">&lt;<br></p>'
    assert join("&", tag("img", alt=None, stroke_width=1.04)) == '&amp;<img stroke-width="1">'


def test_coordinates_are_short() -> None:
    values = (0.0, -0.04, 1.0, -0.1, 12.34)
    assert [number(value) for value in values] == ["0", "0", "1", "-0.1", "12.3"]
