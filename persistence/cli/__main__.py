"""``python -m persistence.cli``."""

from __future__ import annotations

from persistence.cli import main

if __name__ == "__main__":
    main()
