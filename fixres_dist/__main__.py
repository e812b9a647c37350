"""`python -m fixres_dist COMMAND`: the same program as `fixres`."""

import sys

from fixres_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main(form="module"))
