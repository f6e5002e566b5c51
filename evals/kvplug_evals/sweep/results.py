"""What a sweep leaves behind: a directory for each setting, or one file of them all.

A sweep writes directories. ``pack`` folds the finished ones into ``results.jsonl``, a line for
each setting; both are read alike, and a sweep that goes on leaves out what either holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug_evals.scbench.tasks import source
from kvplug_evals.sweep.settings import ours

PACKED = "results.jsonl"
REFUSED = "refused.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A setting of a sweep, finished."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def policy(self) -> str:
        return str(self.config["policy"])

    @property
    def engine(self) -> str:
        return str(self.config["engine"])

    @property
    def place(self) -> tuple[str, int, str, str]:
        """What names a setting beside its policy."""
        config = self.config
        return config["suite"]["name"], config["tokens"], config["mode"], config["question"]

    @property
    def peers(self) -> str:
        """All that must be the same for two policies to be compared."""
        apart = ("policy", "command", "data_sha256")
        same = {k: v for k, v in self.config.items() if k not in apart}
        return json.dumps(same, sort_keys=True)

    @property
    def flat(self) -> dict[str, str]:
        """Its setting but for policy and suite's name, a text for each key."""
        same = json.loads(self.peers)
        suite = same.pop("suite")
        named = {**same, **{k: v for k, v in suite.items() if k != "name"}}
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in named.items()}

    def of_task(self, task: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["task"] == task]

    def source(self, task: str) -> str:
        """What to say of a task's data: of the setting, for a label stored with the answers
        would stay what it was when the data is called something else.
        """
        if not ours(task):
            return "lm-eval"
        suite = self.config["suite"]
        options = {"data": suite["data"], **(suite["tasks"].get(task) or {})}
        name = task.removeprefix("scbench_").removeprefix("kvplug_")
        return source(name, options["data"], options.get("vocabulary", "uuid"))


def results(out: Path) -> list[Result]:
    """All finished settings, by name. Raises ValueError if there is none."""
    found = {line["name"]: _unpacked(line) for line in _packed(out) if "refused" not in line}
    found |= {d.name: _read(d) for d in _directories(out)}
    if not found:
        raise ValueError(f"{out} holds no finished setting")
    return [found[name] for name in sorted(found)]


def refusals(out: Path) -> dict[str, str]:
    """Policy -> the engine's reason not to start with it."""
    told = {line["name"]: line for line in _packed(out) if "refused" in line}
    told |= {line["name"]: line for line in _refused(out)}
    return {told[name]["config"]["policy"]: told[name]["refused"] for name in sorted(told)}


def finished(out: Path) -> set[str]:
    """Names of settings that need not be run again."""
    packed = {line["name"] for line in _packed(out) if "refused" not in line}
    return packed | {directory.name for directory in _directories(out)}


def config_before(out: Path, name: str) -> dict[str, Any] | None:
    """Of a setting that was begun, finished or refused."""
    file = out / name / "config.json"
    if file.exists():
        return _object(file)
    return next((line["config"] for line in _packed(out) if line["name"] == name), None)


def pack(out: Path) -> Path:
    """Raises ValueError if nothing is finished, OSError."""
    directories = _directories(out)
    lines = {line["name"]: line for line in _packed(out)}
    lines |= {line["name"]: line for line in _refused(out)}
    lines |= {directory.name: _line(_read(directory)) for directory in directories}
    if not lines:
        raise ValueError(f"{out} holds no finished setting")
    file = out / PACKED
    write_whole(file, "".join(_compact(lines[name]) + "\n" for name in sorted(lines)))
    for directory in [*directories, *(out / line["name"] for line in _refused(out))]:
        shutil.rmtree(directory)
    return file


def write_whole(file: Path, text: str) -> None:
    """Or not at all: a reader takes what is there for finished."""
    draft = file.with_suffix(".new")
    draft.write_text(text)
    draft.replace(file)


def _directories(out: Path) -> list[Path]:
    return sorted(file.parent for file in out.glob("*/metrics.json"))


def _read(directory: Path) -> Result:
    return Result(
        name=directory.name,
        config=_object(directory / "config.json"),
        environment=_object(directory / "environment.json"),
        rows=[
            json.loads(line)
            for line in (directory / "predictions.jsonl").read_text().split("\n")
            if line
        ],
    )


def _refused(out: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(out.glob(f"*/{REFUSED}")):
        config = _object(file.with_name("config.json"))
        reason = _object(file)["reason"]
        yield {"name": file.parent.name, "config": config, "refused": reason}


def _packed(out: Path) -> list[dict[str, Any]]:
    file = out / PACKED
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def _line(result: Result) -> dict[str, Any]:
    """Rows as columns, and once what all of them have."""
    rows = result.rows
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    same = {name: column[0] for name, column in columns.items() if _is_constant(column)}
    return {
        "name": result.name,
        "config": result.config,
        "environment": result.environment,
        "questions": len(rows),
        "same": same,
        "each": {name: column for name, column in columns.items() if name not in same},
    }


def _is_constant(column: Sequence[Any]) -> bool:
    return all(value == column[0] and type(value) is type(column[0]) for value in column)


def _unpacked(line: dict[str, Any]) -> Result:
    each: dict[str, list[Any]] = line["each"]
    rows = []
    for number in range(line["questions"]):
        row = line["same"] | {name: column[number] for name, column in each.items()}
        rows.append({name: value for name, value in row.items() if value is not None})
    return Result(
        name=line["name"], config=line["config"], environment=line["environment"], rows=rows
    )


def _compact(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def _object(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found
