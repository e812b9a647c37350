"""Pages that are generated, and what the site takes from outside of docs/.

python docs/pages.py     writes docs/settings.md and docs/commands.md; tests/test_docs.py compares them with the code
mkdocs build --strict    the site; README.md is its first page
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = [ROOT / "fixres_dist" / "config" / name for name in ("schema.py", "stage_settings.py")]
SETTINGS = """\
# Settings

Generated from [schema.py](../fixres_dist/config/schema.py) and [stage_settings.py](../fixres_dist/config/stage_settings.py) by
`python docs/pages.py`.

Every setting can stand on the command line as `section.key=value`, such as `tune.epochs=3`, and in a profile or configuration
file as two levels of YAML. The order is: defaults here, then the recipe, presets, the profile, flags, `section.key=value`; the later
one wins. An unknown key is refused with the nearest name. A run's `config.yaml` holds what was decided.
"""
COMMANDS = """\
# Commands

Generated from the commands' parsers by `python docs/pages.py`. `fixres COMMAND --help` prints the same; `python launch/submit.py` and its
neighbours are `fixres submit` and so on. Exit codes: 0 done or submitted; 2 a mistake that was found before anything started, with
the value, what is accepted and the next command; 1 anything else.
"""
PLAIN = {  # annotations in words
    r"Mapping\[str, str\]": "{name: value}",
    r"tuple\[str, \.\.\.\]": "list of texts",
    r"tuple\[int, \.\.\.\]": "list of numbers",
    r"\bstr\b": "text",
    r"\b(int|float)\b": "number",
    r"\bbool\b": "true, false",
}
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def comment(lines: list[str], field: ast.AnnAssign) -> str:
    """The comment behind a field, or those on the lines above it."""
    if found := re.search(r"  # (.+)$", lines[(field.end_lineno or field.lineno) - 1]):
        return found[1]
    above: list[str] = []
    number = field.lineno - 2
    while lines[number].strip().startswith("#"):
        above.insert(0, lines[number].strip().lstrip("# "))
        number -= 1
    return " ".join(above)


def settings_page() -> str:
    """A table for each section: key, accepted values, default, meaning."""
    files = [(text.splitlines(), ast.parse(text).body) for text in (file.read_text() for file in SCHEMA)]
    named = {  # the Literals that have a name
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for _, body in files
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal")
    }
    sections = {node.name: (node, lines) for lines, body in files for node in body if isinstance(node, ast.ClassDef)}
    config, _ = sections["Config"]
    page = [SETTINGS]
    for part in (field for field in config.body if isinstance(field, ast.AnnAssign)):
        section, lines = sections[ast.unparse(part.annotation).removesuffix(" | None")]
        page += [f"## {section.name.lower()}", ""]
        if about := ast.get_docstring(section):
            page += [f"{about} It has the keys of `tune` too; those that differ are here.", ""]
        page += [row("key", "values", "default", "meaning"), row(*["---"] * 4)]
        for field in section.body:
            if isinstance(field, ast.AnnAssign) and field.value:
                kind, default = ast.unparse(field.annotation), ast.unparse(field.value)
                kind = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), named.get(kind, kind))
                for word, plain in PLAIN.items():
                    kind = re.sub(word, plain, kind)
                default = {"''": "empty", "()": "[]", "field(default_factory=dict)": "{}", "False": "false"}.get(
                    default, default
                )
                key = f"`{section.name.lower()}.{ast.unparse(field.target)}`"
                page.append(row(key, kind, default.strip("'"), comment(lines, field)))
        page.append("")
    return "\n".join(page)


def options(p: argparse.ArgumentParser) -> Iterator[str]:
    """The tables of a parser's groups, and of its subcommands."""
    for group in p._action_groups:
        shown = [a for a in group._group_actions if a.help not in (argparse.SUPPRESS, None) and a.dest != "help"]
        subcommands = [a for a in shown if isinstance(a, argparse._SubParsersAction)]
        if rest := [a for a in shown if a not in subcommands]:
            title = "" if group.title in ("options", "positional arguments") else f"{group.title}"
            yield from (row(title, ""), row("---", "---"))
            for action in rest:
                choices = f"{{{','.join(action.choices or ())}}}"
                value = action.metavar or (choices if action.choices else action.dest.upper())
                words = ", ".join(action.option_strings)
                takes = "" if action.nargs == 0 and words else f" {value}"
                yield row(f"`{words}{takes}`".replace("` ", "`"), str(action.help))
            yield ""
        for action in subcommands:
            for name, sub in action.choices.items():
                yield from (f"### {p.prog.split()[-1]} {name}", "", f"{str(sub.description).capitalize()}.", "")
                yield from options(sub)


def commands_page() -> str:
    """For each command what it does, its options by group, and its examples."""
    os.environ["FIXRES_COMMAND_FORM"] = "fixres"
    from fixres_dist.cli.main import GROUPS, add_command

    page = [COMMANDS]
    for title, group in GROUPS.items():
        for name in group:
            p = add_command(argparse.ArgumentParser(prog=f"fixres {name}"), name)
            examples = str(p.epilog).partition("\n")[2]
            page += [f"## {name}", "", f"*{title}.* {p.description}", "", *options(p)]
            page += ["```sh", *(line.strip() for line in examples.splitlines()), "```", ""]
    return "\n".join(page)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: README.md is the first page; files outside of docs/ that a page links to are copied."""
    from mkdocs.structure.files import File

    first = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=first))
    for page in files.documentation_pages():
        for target in LINK.findall(on_page_markdown(page.content_string)):
            outside = ROOT / target
            if outside.is_file() and not files.get_file_from_path(target):
                files.append(File.generated(config, target, abs_src_path=str(outside)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside of docs/, as the site has them."""
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # the commands of this checkout, not of an installed one
    for name, text in (("settings", settings_page()), ("commands", commands_page())):
        (ROOT / "docs" / f"{name}.md").write_text(text)
