"""Local attention for some of the layers: they see a window, the others see all.

    query i of a local layer sees token j  iff  i - window < j <= i

Character.AI, "Optimizing AI Inference at Character.AI", 2024,
https://research.character.ai/optimizing-inference/ (five layers of six, 1,024 tokens)

Differs from the source: its models are trained so, and lose nothing; a model that was not loses
what its layers fetched from afar. How much depends on which they are: choose them by measurement.
Keys keep their rotary base and positions.

``layers`` counts the model's attention layers from 0, those that have a window by its
configuration included, and is written as Python's slices are: "1::2" is every second one, "0,3,8:"
the first, the fourth, and all from the ninth on. The window is the engine's own, exact to the
token, and nothing is kept at a request's start (``streaming_llm`` does, in all layers).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvplug.compress import LocalLayers

NUMBER = r"\s*-?[0-9]{1,9}\s*"
PART = re.compile(rf"{NUMBER}|(?:{NUMBER}|\s*)(?::(?:{NUMBER}|\s*)){{1,2}}")


@dataclass(frozen=True, kw_only=True)
class Local(LocalLayers):
    name = "local"
    paper = "https://research.character.ai/optimizing-inference/"

    layers: str
    """Numbers and slices, joined by commas."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, str) or not all(
            PART.fullmatch(part) and _slice(part).step != 0 for part in self.layers.split(",")
        ):
            raise ValueError(
                "local: layers must be a text of layers' numbers and slices of them, got "
                f'{self.layers!r}; write local(layers="1::2"), for every second layer, or '
                'local(layers="0,3,8:")'
            )

    def local_layers(self, layers: int) -> tuple[int, ...]:
        chosen: set[int] = set()
        for part in self.layers.split(","):
            found = range(layers)[_slice(part)]
            if not found:
                raise ValueError(
                    f"local: the model's attention layers are 0 to {layers - 1}, and "
                    f"{part.strip()!r} of layers={self.layers!r} is none of them; write, for "
                    'example, local(layers="1::2")'
                )
            chosen.update(found)
        return tuple(sorted(chosen))


def _slice(part: str) -> slice:
    """A number is a slice of one layer; of none, where there is no such layer."""
    numbers = [int(number) if number.strip() else None for number in part.split(":")]
    if len(numbers) > 1:
        return slice(*numbers)
    (only,) = numbers
    assert only is not None
    return slice(only, only + 1 or None)
