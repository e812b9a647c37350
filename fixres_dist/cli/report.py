"""`fixres report`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fixres_dist.base.errors import EXIT_DONE
from fixres_dist.base.files import write_text
from fixres_dist.base.small_files import as_json
from fixres_dist.runs.rundir import RunDir

EXAMPLES = ("runs/*", "runs/b0-320 --html", "runs/b0-320 --json")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, finished or not")
    text = "folder of report.md and report.png; default: report/ beside the first run"
    p.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "also report.html: one page with everything in it, to be sent to somebody"
    p.add_argument("--html", action="store_true", help=text)
    p.add_argument("--json", action="store_true", help="print the rows as JSON; write nothing")


def run(args: argparse.Namespace) -> int:
    """One row for each finished run, beside what was published for its model; the state of the others."""
    from fixres_dist.publishing import figures, report, run_page
    from fixres_dist.publishing.html_page import html_page

    runs = [RunDir(root) for root in args.runs if (root / "config.yaml").exists()]
    if not runs:
        RunDir(args.runs[0]).config()  # refuses what is no run directory
    if left_out := [str(root) for root in args.runs if RunDir(root) not in runs]:  # as a report that runs/* names too
        print(f"left out, no run directories: {', '.join(left_out)}", file=sys.stderr)
    rows, others = report.rows(runs)
    if args.json:
        print(as_json({"runs": [row.record() for row in rows], "unfinished": others}, indent=1))
        return EXIT_DONE
    out = args.out or runs[0].root.parent / "report"
    text = report.markdown(runs, rows, others, out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.md", text)
    if rows:
        figures.gain_plot(rows, out / "gains.png")
        figures.published_plot(report.published_curves() if report.of_imagenet(rows) else {}, rows, out / "report.png")
    print(f"{text}\n{out / 'report.md'}")
    if args.html:
        whole = "\n".join([report.markdown([], rows, others, out), *run_page.pages(rows, out)])
        write_text(out / "report.html", html_page(", ".join(run.name for run in runs), whole, out))
        print(out / "report.html")
    return EXIT_DONE
