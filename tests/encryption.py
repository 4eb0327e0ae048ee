"""Whether the tests run with encryption on: with ``ENCRYPT=1`` in the environment.

The fault and crash suites, and whatever else uses the helpers of `tests.engine` and
`tests.support`, then prove of encrypted directories what they prove of plain ones.
"""

from __future__ import annotations

import os
from typing import Any, Final

IS_ON: Final = os.environ.get("ENCRYPT") == "1"
KEYS: Final = ("0b" * 32, "5e" * 32)
"""An older key and the newest."""


def sections() -> dict[str, Any]:
    """Return what a configuration says about it: a section to be merged, or nothing."""
    return {"security": {"encrypt": True, "secret_keys": ",".join(KEYS)}} if IS_ON else {}
