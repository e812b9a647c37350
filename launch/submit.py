"""`fixres submit` without an installed package: `python launch/submit.py` in a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixres_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]], form="launch"))
