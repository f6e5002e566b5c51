"""Requests that compile a context: one for each chunk, which they repeat."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from kvplug.accounting import Labels
from kvplug.config import Settings
from kvplug.grammar import parse
from kvplug.plan import Planner

REQUEST = json.dumps({"compile": True})
"""What such a request says to kvplug: ``vllm_xargs={"kvplug": REQUEST}``."""
PATIENCE = 3600
"""Seconds for one request."""


def repetitions(context: Sequence[int], chunk: int) -> Iterator[list[int]]:
    """Prompts that compile the whole chunks of a context, first to last: the context up to the
    chunk's end, and the chunk again. What is left of it behind the last whole chunk is not
    compiled.

    context: tokens. chunk: in tokens, as the engine packs them, whole pages. Raises ValueError
    for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"a chunk must have at least 1 token, got {chunk}; write chunk=512")
    for end in range(chunk, len(context) + 1, chunk):
        yield [*context[:end], *context[end - chunk : end]]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What became of a context."""

    policy: str
    tokens: int
    """Of the context."""
    chunk: int
    """Tokens that are compiled together."""
    chunks: int
    blocks: int
    """Of the engine's, that those chunks take whole."""
    kept: int
    """And compiled."""


@dataclass(frozen=True)
class Server:
    """A vLLM server that kvplug serves under a policy which compiles."""

    url: str

    def compile(
        self, text: str, role: str | None = None, tell: Callable[[int, int], None] | None = None
    ) -> Compiled:
        """role: of a conversation's first message that begins with the text; None for a prompt of
        plain completions. tell: called with the chunks that are done, and that there are.

        Raises ValueError, with what the server said, where it does not compile or refuses.
        """
        model = self._json("v1/models")["data"][0]["id"]
        policy, planner = self._policy()
        chunk = planner.chunk * planner.page_size
        asked: dict[str, Any] = {"prompt": text}
        if role is not None:
            messages = [{"role": role, "content": text}]
            asked = {"messages": messages, "add_generation_prompt": False}
        tokens = self._json("tokenize", {"model": model, **asked})["tokens"]
        chunks = len(tokens) // chunk
        for number, prompt in enumerate(repetitions(tokens, chunk), 1):
            own = {"vllm_xargs": {"kvplug": REQUEST}, "max_tokens": 1}
            self._json("v1/completions", {"model": model, "prompt": prompt, **own})
            if tell is not None:
                tell(number, chunks)
        return Compiled(
            policy=policy, tokens=len(tokens), chunk=chunk, chunks=chunks,
            blocks=chunks * planner.chunk, kept=chunks * planner.schedule.kept,
        )  # fmt: skip

    def _policy(self) -> tuple[str, Planner]:
        """What the server's metrics name."""
        page = self._read("metrics")
        sizes = re.findall(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"', page)
        lines = re.findall(r'kvplug_packed_prompts_total\{[^}]*\bpolicy="([^"]*)"', page)
        for line in lines if sizes else []:
            if line == Labels.REST:
                continue
            scored = parse(line).scored
            if scored is not None and scored.compiles:
                return line, Planner(Settings(policy=parse(line)), int(sizes[0]))
        raise ValueError(
            f"the server at {self.url} compiles no contexts, as far as its metrics say "
            f"({', '.join(lines) or 'nothing of kvplug'}); start it with --attention-backend "
            "kvplug --additional-config "
            '\'{"kvplug": {"policy": "kvzip(budget=0.25, chunk=512)"}}\''
        )

    def _json(self, path: str, body: object = None) -> Any:
        return json.loads(self._read(path, body))

    def _read(self, path: str, body: object = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = Request(
            f"{self.url.rstrip('/')}/{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urlopen(request, timeout=PATIENCE) as answer:
                return str(answer.read().decode())
        except HTTPError as error:
            said = error.read().decode(errors="replace")
            raise ValueError(f"{self.url}/{path} answered {error.code}: {said}") from None
        except URLError as error:
            raise ValueError(f"{self.url} does not answer: {error.reason}") from None
