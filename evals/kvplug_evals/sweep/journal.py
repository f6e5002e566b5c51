"""What a setting has answered so far, a line each: what is there is not asked again."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvplug_evals.engines.interface import Reply, Wave


class Journal:
    """Answers, losses and waves of one setting, kept in a file as they come."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.replies: dict[str, Reply] = {}
        self.waves: list[dict[str, Any]] = []
        self.opened, self.before = time.monotonic(), 0.0
        if file is not None and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        whole = []
        for line in file.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short, or bytes that are no text
            whole.append(json.dumps(row))
            if "reply" in row:
                reply = Reply(**row["reply"])
                self.replies[reply.key] = reply
            else:
                self.waves.append(row["wave"])
                self.before = row["wave"].get("elapsed", 0.0)
        draft = file.with_suffix(".new")
        draft.write_text("".join(f"{line}\n" for line in whole))
        draft.replace(file)  # a kill meanwhile leaves one or the other

    @property
    def seconds(self) -> float:
        """Since the setting began, without the time between its last wave and a restart."""
        return self.before + time.monotonic() - self.opened

    def add(self, reply: Reply) -> None:
        self.replies[reply.key] = reply
        self._write({"reply": asdict(reply)})

    def add_wave(self, wave: Wave, block_bytes: int) -> None:
        row = {name: value for name, value in asdict(wave).items() if name != "replies"}
        row["keys"] = [reply.key for reply in wave.replies]
        row["block_bytes"] = block_bytes
        row["elapsed"] = round(self.seconds, 3)
        self.waves.append(row)
        self._write({"wave": row})

    def wave_of(self) -> dict[str, dict[str, Any]]:
        """Key of a reply -> its wave."""
        return {key: wave for wave in self.waves for key in wave["keys"]}

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a") as out:
                out.write(json.dumps(row) + "\n")
