"""docs/assets/answers.svg: answers against bytes read, of the published results.

    python tools/chart.py        # in vLLM's environment: the evals' own reader

Exact recall at 8,192 tokens, in a conversation, the question in view: the share of look-ups that
come out right against a decode step's bytes, digests included, as a share of dense's.
"""

from __future__ import annotations

from pathlib import Path

from kvplug import Planner, Settings, byte_share, parse
from kvplug_evals.sweep.results import results

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs/assets/answers.svg"
TOKENS, PAGE, ITEM = 8192, 32, 2
FAMILIES = {
    "twilight": "#1565c0",
    "quest": "#c77700",
    "snapkv": "#2e8b57",
    "streaming_llm": "#8e5bb5",
    "random": "#8a8f98",
}
LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 64, 150, 24, 52, 760, 400


def points() -> dict[str, list[tuple[float, float]]]:
    """Family -> (share of dense's bytes, share of look-ups), by bytes."""
    found: dict[str, dict[float, float]] = {name: {} for name in ("dense", *FAMILIES)}
    for folder in ("recall-cpu", "recall-tokens-cpu"):
        for result in results(ROOT / "evals/results" / folder):
            _, tokens, mode, question = result.place
            if (tokens, mode, question) != (TOKENS, "multi-turn", "aware"):
                continue
            if result.policy.startswith("engine("):
                continue
            policy = parse(result.policy)
            parts = [part.name for each in policy for part in each.parts] or ["dense"]
            odd = (
                "top_p" in result.policy or "bits=1" in result.policy or "bits=4" in result.policy
            )
            if len(parts) > 1 or parts[0] not in found or odd:
                continue
            rows = result.rows
            right = sum(row["agreement"] for row in rows) / len(rows)
            found[parts[0]][bytes_read(result.policy)] = right
    return {name: sorted(each.items()) for name, each in found.items()}


def bytes_read(line: str) -> float:
    policy = parse(line)
    if policy.is_dense:
        return 1.0
    selector = policy.selector
    if selector is not None:
        rows = selector.digest.rows(PAGE, ITEM) if selector.digest else 0
        return byte_share(TOKENS, selector.budget, PAGE, rows)
    if policy.eviction is not None:
        return Planner(Settings(policy=policy), PAGE).eviction.most_tokens() / TOKENS  # type: ignore[union-attr]
    assert policy.scored is not None
    return policy.scored.budget / TOKENS


def render() -> str:
    found = points()
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(share: float) -> float:
        return LEFT + share / 0.6 * across

    def y(share: float) -> float:
        return TOP + (1 - share) * down

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="14">',
        "<title>Look-ups of exact recall that come out right, against bytes read</title>",
        "<style>.ink{fill:#3b4048}.line{stroke:#9aa2ae;stroke-opacity:.45}"
        "@media(prefers-color-scheme:dark){.ink{fill:#d5d9df}}</style>",
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_line(LEFT, y(tick), LEFT + across, y(tick)))
        parts.append(_text(LEFT - 8, y(tick) + 5, f"{tick:.0%}", "end"))
    for tick in (0, 0.125, 0.25, 0.5):
        parts.append(_line(x(tick), TOP, x(tick), TOP + down))
        parts.append(_text(x(tick), TOP + down + 20, f"{tick:.3g}".lstrip("0") or "0", "middle"))
    parts.append(
        _text(LEFT + across / 2, HEIGHT - 8, "bytes that a decode step reads, of dense", "middle")
    )
    parts.append(_text(LEFT + 4, TOP - 8, "look-ups that come out right, 8,192 tokens", "start"))
    parts.append(
        f'<path d="M{LEFT} {y(1):.1f}H{LEFT + across}" stroke="#5d6470" stroke-width="2" '
        'stroke-dasharray="6 4" fill="none"/>'
    )
    parts.append(_text(LEFT + across + 8, y(1) + 5, "dense (at 1)", "start"))
    ends = {}
    for name, colour in FAMILIES.items():
        places = [(x(a), y(b)) for a, b in found[name]]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5" fill="{colour}"/>' for a, b in places
        ]
        ends[name] = places[-1]
    parts += _labels(ends)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _labels(ends: dict[str, tuple[float, float]]) -> list[str]:
    """Behind each line's end, one below the other where two would meet."""
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for name, (a, b) in sorted(ends.items(), key=lambda item: item[1][1]):
        below = b + 22 if name == "twilight" else b + 5
        while any(abs(below - other) < 16 and abs(a - at) < 120 for at, other in taken):
            below += 16
        taken.append((a, below))
        parts.append(
            f'<text x="{a + 9:.1f}" y="{below:.1f}" fill="{FAMILIES[name]}" font-weight="600">'
            f"{name}</text>"
        )
    return parts


def _line(a: float, b: float, c: float, d: float) -> str:
    return f'<line class="line" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'


def _text(a: float, b: float, text: str, anchor: str) -> str:
    return f'<text class="ink" x="{a:.1f}" y="{b:.1f}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(render())
