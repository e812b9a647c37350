"""Markdown as one HTML file that needs nothing beside it: its pictures stand in it, and no name in it becomes a tag."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { font-weight: 600; line-height: 1.25; margin-top: 2rem }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
table { font-size: 0.9rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 }
img { max-width: 100%; height: auto }
code, pre { font-size: 0.9em; background: #f4f4f4; border-radius: 3px; padding: 0.1em 0.3em }
pre { padding: 0.6em; overflow-x: auto }
pre code { padding: 0 }
@media print { body { max-width: none; margin: 0; font-size: 11px } table { display: table } h2, img { break-after: avoid } }
"""
IMAGE = re.compile(r'<img alt="([^"]*)" src="([^"]*)"[^>]*>')
LINK = re.compile(r'(<a) href="(?!https?://|#|[\w./-]+")[^"]*"')  # such as javascript:


def html_page(title: str, text: str, folder: Path) -> str:
    """The page of `text`, in markdown with tables. Tags in it are shown as they are written.

    Pictures, PNG files named from `folder`, are put into the page; of one that is not there the page has its description.
    """
    import markdown

    converter = markdown.Markdown(extensions=["tables", "fenced_code"])
    converter.preprocessors.deregister("html_block")  # without these two, a tag is text
    converter.inlinePatterns.deregister("html")

    def inlined(found: re.Match[str]) -> str:
        file = folder / html.unescape(found[2])
        if file.suffix != ".png" or not file.is_file():
            return f"<em>{found[1]}</em>"
        return f'<img alt="{found[1]}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'

    body = IMAGE.sub(inlined, LINK.sub(r"\1", converter.convert(text)))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def verbatim(name: object) -> str:
    """`name` in markdown as it is written: none of its signs marks it up. Bars are left to `base.text.markdown_table`."""
    return re.sub(r"([\\`*\[\]!]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", html.escape(str(name), quote=False))
