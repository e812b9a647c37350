"""`fixres completion`"""

from __future__ import annotations

import argparse
from pathlib import Path

from fixres_dist.base.errors import EXIT_DONE

EXAMPLES = ("bash > ~/.local/share/bash-completion/completions/fixres", 'zsh > "${fpath[1]}/_fixres"')


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("shell", choices=("bash", "zsh"))


def run(args: argparse.Namespace) -> int:
    import shtab

    from fixres_dist.cli.main import COMMANDS, add_command

    p = argparse.ArgumentParser(prog="fixres")
    commands = p.add_subparsers()
    for name, text in COMMANDS.items():
        for action in add_command(commands.add_parser(name, help=text), name)._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(p, shell=args.shell))
    return EXIT_DONE
