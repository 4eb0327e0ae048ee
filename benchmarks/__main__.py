"""Run the command line."""

from __future__ import annotations

import sys

from benchmarks.cli import main

if __name__ == "__main__":  # contenders' processes import this module anew
    sys.exit(main())
