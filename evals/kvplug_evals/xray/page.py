"""Looks -> one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import zlib
from importlib.resources import files

from kvplug_evals.xray.looks import KEPT, LEVELS, READ, Looks


def render(looks: Looks, *, line: str, model: str, layers: list[int]) -> str:
    """layers: numbers of the model's layers that are shown."""
    steps, _, heads, tokens = looks.seen.shape
    about = {
        "line": line, "model": model, "prompt": looks.prompt, "tokens": looks.tokens,
        "answer": looks.answer, "said": looks.said, "layers": layers, "heads": heads,
        "steps": steps, "count": tokens, "kept": KEPT, "read": READ, "levels": LEVELS,
        "lost": [[[round(float(x), 4) for x in row] for row in step] for step in looks.lost],
        "strongest": looks.strongest.tolist(),
    }  # fmt: skip
    template = files("kvplug_evals.xray").joinpath("page.html").read_text()
    # A script ends at its end tag, wherever that stands.
    stated = json.dumps(about, separators=(",", ":")).replace("</", "<\\/")
    packed = base64.b64encode(zlib.compress(looks.seen.tobytes(), 9)).decode()
    filled = template.replace("{{title}}", html.escape(f"{line} on {model}"))
    return filled.replace("{{about}}", stated).replace("{{seen}}", packed)
