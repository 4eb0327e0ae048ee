"""Run the command line."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # Each contender's process imports this module anew, and needs nothing of the command line.
    from benchmarks.cli import main

    # Whoever ends it, its processes and servers end as well, and its files go.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
