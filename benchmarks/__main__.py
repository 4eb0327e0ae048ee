"""Run the command line."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Each contender's process imports this module anew, and needs nothing of the command line.
    from benchmarks.cli import main

    sys.exit(main())
