"""`fixres completion`: of commands, options, paths, and the names of runs (in runs/) and models."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from fixres_dist.base.environment import shipped
from fixres_dist.base.errors import EXIT_DONE

# Functions of the shell, given the word so far where the shell is bash. A run's jobs are left out: their names are paths.
RUNS = "ls -1 runs 2> /dev/null"
MODELS = "echo demo; echo r50; cut -d, -f2 {published} | sort -u; cut -d, -f1 {timm}"
PREAMBLE = {
    "bash": """
_fixres_runs() {{ compgen -W "$({runs})" -- "$1"; }}
_fixres_models() {{ compgen -W "$({models})" -- "$1"; }}
""",
    "zsh": """
_fixres_runs() {{ compadd -- ${{(f)"$({runs})"}} }}
_fixres_models() {{ compadd -- ${{(f)"$({models})"}} }}
""",
}

EXAMPLES = (
    "bash > ~/.fixres.bash; echo '. ~/.fixres.bash' >> ~/.bashrc",
    "zsh > ~/.fixres.zsh; echo 'autoload -Uz compinit; compinit; eval \"$(<~/.fixres.zsh)\"' >> ~/.zshrc",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("shell", choices=("bash", "zsh"))


def run(args: argparse.Namespace) -> int:
    import shtab

    from fixres_dist.cli.main import COMMANDS, add_command

    models = MODELS.format(published=quoted("published.csv"), timm=quoted("timm_sizes.csv"))
    p = argparse.ArgumentParser(prog="fixres")
    commands = p.add_subparsers()
    for name, text in COMMANDS.items():
        for action in add_command(commands.add_parser(name, help=text), name)._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest in ("name", "names") and not action.option_strings:
                action.complete = dict.fromkeys(PREAMBLE, "_fixres_runs")  # type: ignore[attr-defined]
            elif "--model" in action.option_strings:
                action.complete = dict.fromkeys(PREAMBLE, "_fixres_models")  # type: ignore[attr-defined]
    preamble = PREAMBLE[args.shell].format(runs=RUNS, models=models)
    script = shtab.complete(p, shell=args.shell, preamble=preamble)
    print(for_zsh(script) if args.shell == "zsh" else script)
    return EXIT_DONE


def for_zsh(script: str) -> str:
    """shtab's `script` where each of several words is completed, not the first alone, and where free words such as
    settings (`( )`: no candidate) do not keep zsh from filling in the only option that fits."""
    every = re.sub(r'"\(\*\)::?', '"*:', script)
    return re.sub(r'^(  "\*:.*:)"$', r'\1( )"', every, flags=re.MULTILINE)


def quoted(name: str) -> str:
    return shlex.quote(str(shipped("configs") / name))
