"""One HTML file of a report: complete in itself, and names in it are text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fixres_dist.base.text import markdown_table
from fixres_dist.publishing.html_page import html_page, verbatim

NAMES = (
    "tf_efficientnet_b0.ns_jft_in1k",
    "<script>alert(1)</script>",
    "a|b",
    "*bold* __init__ _x_",
    "[x](javascript:alert(1))",
    "![x](/etc/passwd)",
    "<https://a.example>",
    "`code` \\ & &lt; 'q' \"d\"",
    "<!-- gone -->",
    "été 猫",
)


class Seen(HTMLParser):
    """Tags with their attributes, and the text of each cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is_written(name: str, tmp_path: Path) -> None:
    text = f"# {verbatim(name)}\n\n{markdown_table(('name',), [(verbatim(name),)])}\n"
    page = html_page(name, text, tmp_path)
    seen = Seen(page)
    assert seen.cells[0].strip() == name
    shown = {"html", "head", "meta", "title", "style", "body", "h1", "table", "thead", "tbody", "tr", "th", "td"}
    assert {tag for tag, _ in seen.tags} <= shown


def test_a_name_that_nobody_has_escaped_runs_nothing(tmp_path: Path) -> None:
    """Markup may come through, but no tag, no script behind a link and no file that is no picture."""
    (tmp_path / "secret.txt").write_text("secret")
    page = html_page(
        "t", "\n\n".join([*NAMES, "![x](secret.txt)", "[x](JaVaScRiPt:a)", "[x](data:text/html,a)"]), tmp_path
    )
    seen = Seen(page)
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert [a["href"] for tag, a in seen.tags if tag == "a" and "href" in a] == ["https://a.example"]


def test_pictures_stand_in_the_page(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a b").mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(tmp_path / "runs" / "a b" / "sweep.png")
    (tmp_path / "report").mkdir()
    text = "![the sweep](<../runs/a b/sweep.png>)\n\n![gone](gone.png)\n\n[docs](https://example.org/x)"
    page = html_page("Runs & more", text, tmp_path / "report")
    assert "<title>Runs &amp; more</title>" in page
    (picture,) = (a for tag, a in Seen(page).tags if tag == "img")
    assert (picture["alt"], (picture["src"] or "")[:22]) == ("the sweep", "data:image/png;base64,")
    assert "<em>gone</em>" in page
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)', page) == ["https://example.org/x"], (
        "nothing is loaded from elsewhere"
    )
