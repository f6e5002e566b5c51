"""What tests ask about processes that they did not start themselves."""

import contextlib
from pathlib import Path


def runs(process: int) -> bool:
    """A zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
