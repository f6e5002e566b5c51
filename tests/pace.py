"""How long a suite took and why: seconds, engine starts and the slowest tests.

Each run of pytest prints its own and, where ``KVPLUG_PACE`` names a file, adds a line to it.
``python tests/pace.py FILE`` sums the lines up: what ``make test`` ends with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SLOWEST = 20


class Pace:
    """Of this process; with pytest-xdist, of the workers too."""

    starts = 0
    """Engines that the running test has started so far."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.seconds: Counter[str] = Counter()
        self.engines = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        report.user_properties.append(("engines", Pace.starts))
        Pace.starts = 0
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        self.engines += sum(n for name, n in report.user_properties if name == "engines")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        took = time.monotonic() - self.begin
        terminalreporter.write_line(line(took, self.engines))
        file = os.environ.get("KVPLUG_PACE")
        if file and "PYTEST_XDIST_WORKER" not in os.environ:  # the process that they tell counts
            found = {"took": took, "engines": self.engines, "slowest": self.slowest()}
            with open(file, "a") as out:
                print(json.dumps(found), file=out)

    def slowest(self) -> list[tuple[str, float]]:
        return self.seconds.most_common(SLOWEST)


def line(seconds: float, engines: int) -> str:
    return f"{seconds / 60:.1f} minutes, {engines} engines started"


def main(file: str) -> None:
    runs = [json.loads(each) for each in Path(file).read_text().splitlines()]
    slowest = sorted((one for run in runs for one in run["slowest"]), key=lambda one: -one[1])
    print(f"The slowest {SLOWEST} tests, in seconds:")
    for test, seconds in slowest[:SLOWEST]:
        print(f"{seconds:7.1f}  {test}")
    print(line(sum(run["took"] for run in runs), sum(run["engines"] for run in runs)))


if __name__ == "__main__":
    main(sys.argv[1])
