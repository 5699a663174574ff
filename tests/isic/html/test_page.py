import pytest

from isic.html import page
from isic.html.markup import Markup, tag


@pytest.mark.parametrize(
    ("share", "text"), [(0.75, "75"), (0.00098, "0.098"), (0.0, "0"), (0.1234, "12"), (1.0, "100")]
)
def test_shares_have_two_significant_digits(share: float, text: str) -> None:
    assert page.percent(share) == f"{text}\N{NO-BREAK SPACE}%"


def test_a_page_loads_nothing_and_escapes_its_text() -> None:
    text = page.document("a < b", tag("p", "<script>"), style="p { color: red }")
    assert text.startswith("<!doctype html>")
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert "<title>a &lt; b</title>" in text
    assert "<p>&lt;script&gt;</p>" in text
    assert "p { color: red }" in text


def test_links_lead_to_sections() -> None:
    assert 'href="#false-alarms">False alarms<' in page.links(["False-alarms"])
    assert 'id="false-alarms"' in page.section("False-alarms", "Worst false alarms")


def test_only_the_last_rows_of_a_table_are_sums() -> None:
    table = page.table("t", ("name", "value"), [("a", "1"), ("b", "2"), ("all", "3")], sums=1)
    assert table.count('class="sum"') == 1
    assert '<tr class="sum"><th scope="row">all</th><td>3</td></tr>' in table


def test_the_longest_bar_fills_its_cell() -> None:
    bars = page.bars("b", ("name", "share"), [(Markup("a"), 0.1), (Markup("b"), 0.4)])
    assert 'style="width:25.0%"' in bars
    assert 'style="width:100.0%"' in bars
