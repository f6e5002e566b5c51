"""What ends a command that runs engines."""

from __future__ import annotations

import signal


class Interrupts:
    """Ctrl-C, and all that ends a process like it, so that no engine outlives us.

    Remembered, because a KeyboardInterrupt that comes while a library cleans up goes no further.
    """

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._take)

    def check(self) -> None:
        if self.came:
            raise KeyboardInterrupt

    def _take(self, number: int, frame: object) -> None:
        self.came = True
        raise KeyboardInterrupt
