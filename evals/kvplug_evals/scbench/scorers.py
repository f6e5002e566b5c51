"""Scores of one answer: ``compat`` as SCBench publishes them, defects included, and ``fixed``.

Each metric takes (prediction, answer, options) to a number from 0 to 1. What ``fixed`` mends:

    kv, prefix_suffix   a label inside a longer word counts          -> whole words only
    vt                  the same, and shares are rounded to 0.01     -> whole words, not rounded
    mf, passkey         signs are lost, 3.7 counts as 3, 1,024 as 1, and a label that is a number
                        never equals the text found                  -> numbers are compared
    vt, many_shot, qa_chn
                        loop over the label: over the letters of a label that is a text
                                                                     -> the whole label
    qa_eng              a label inside a longer word counts          -> F1 of words
    choice_eng          an answer that begins with A ("According …") is an A
                                                                     -> a letter that stands alone
    repoqa              comments, docstrings and a missing fence lower the similarity, and of
                        equals the first counts                      -> not so; the one meant
    summary             rougeLsum without lines is rougeL            -> a sentence a line
    recall              nothing

SCBench's runner makes lists of qa_eng's and choice_eng's labels before it scores them, and leaves
those of other tasks as their data has them.
"""

from __future__ import annotations

import ast
import io
import re
import string
import textwrap
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from kvplug_evals.scbench.functions import first_function
from kvplug_evals.scbench.schema import Answer

Score = Callable[[str, Answer, Sequence[str]], float]
SIMILAR = 0.8
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
"""Commas belong to it between thousands alone."""


def _characters(*spans: tuple[int, int]) -> frozenset[str]:
    return frozenset(chr(code) for first, last in spans for code in range(first, last + 1))


CHINESE_MARKS = _characters(
    *((0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003)),
    *((0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F)),
    *((0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64)),
)
"""What SCBench takes for punctuation beside ASCII's; 《, 〈, 〉 and ． are not among it."""


def score(
    metric: str, prediction: str, answer: Answer, options: Sequence[str]
) -> tuple[float, float]:
    """-> (compat, fixed)"""
    compat, fixed = METRICS[metric]
    return float(compat(prediction, answer, options)), float(fixed(prediction, answer, options))


def contained(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return float(_text(answer) in prediction)


def contained_word(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return float(_stands_alone(_text(answer), prediction))


def share_contained(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    wanted = _items(answer)
    return round(sum(a.lower() in prediction.lower() for a in wanted) / len(wanted), 2)


def share_of_words(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    wanted = _list(answer)
    return sum(_stands_alone(a.lower(), prediction.lower()) for a in wanted) / len(wanted)


def first_number(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    label = answer[0] if isinstance(answer, list) else answer
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return 0.0
    number = float(found[0])
    return float(number == label if isinstance(label, float) else int(number) == int(label))


def equal_number(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    label = answer[0] if isinstance(answer, list) else answer
    found = NUMBER.search(prediction)
    return float(found is not None and abs(float(found[0].replace(",", "")) - float(label)) < 1e-6)


def first_digits(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    label = answer[0] if isinstance(answer, list) else answer
    found = re.search(r"[0-9]+", prediction)
    return float((found[0] if found else "") == label)


def any_item_contained(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return float(any(item.upper() in prediction.strip().upper() for item in _items(answer)))


def any_contained(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return float(any(label.upper() in prediction.strip().upper() for label in _list(answer)))


def whole_label(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return float(any(_stands_alone(a.lower(), prediction.lower()) for a in _list(answer)))


def word_f1(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return max(_f1(_words(prediction), _words(a)) for a in _list(answer))


def character_f1_of_items(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    def characters(text: str) -> list[str]:
        dropped = CHINESE_MARKS.union(string.punctuation)
        return [c for c in text.lower() if c not in dropped and not c.isspace()]

    return max(_f1(characters(prediction), characters(item)) for item in _items(answer))


def character_f1(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    def characters(text: str) -> list[str]:
        said = (c for c in text.lower() if c not in string.punctuation and not c.isspace())
        return [c for c in said if not unicodedata.category(c).startswith("P")]

    return max(_f1(characters(prediction), characters(a)) for a in _list(answer))


def first_letter(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    """Any answer that begins with A to D is that choice; then a prefix, then a lone letter."""
    labels, text = _choices(answer, options), prediction.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in labels)
    if text in labels:
        return 1.0
    plain = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", text))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = plain.partition(prefix)
        if found:
            return float(any(rest[1:].startswith(label) for label in labels))
    return float(next((word in labels for word in plain.split() if word in "ABCD"), False))


def lone_letter(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    """The first A to D that is no word's part (nor the article); else the option's text."""
    labels = _choices(answer, options)
    found = re.search(r"(?<!\w)([B-D]|A(?!\s+[a-z]))(?!\w)", prediction)
    if found:
        return float(found[1] in labels)
    return float(any(_stands_alone(label, prediction) for label in labels if len(label) > 1))


def similar_function(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    """1 if the function meant is the first of the most similar, and similar enough."""
    wanted, found = _text(answer), first_function(prediction, cut_short=False)
    similar = {text: _bleu(text, found) for text in (*options, wanted)}
    best = max(similar, key=lambda text: similar[text])
    return float(best == wanted and similar[best] >= SIMILAR)


def similar_bare_function(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    """1 if none is more similar than the function meant, and it is similar enough."""
    wanted, found = _text(answer), _bare(first_function(prediction, cut_short=True))
    similar = {text: _bleu(_bare(text), found) for text in {wanted, *options}}
    return float(similar[wanted] >= SIMILAR and similar[wanted] == max(similar.values()))


def rouge(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return _rouge_lsum(prediction, _text(answer))


def rouge_by_sentence(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    def lines(text: str) -> str:
        return "\n".join(re.split(r"(?<=[.!?])\s+", " ".join(text.split())))

    return _rouge_lsum(lines(prediction), lines(_text(answer)))


def hops(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    """Share of the answer's tokens that are right, place by place."""
    wanted = _text(answer).split()
    found = prediction.split()[: len(wanted)]
    return sum(f == w for f, w in zip(found, wanted, strict=False)) / len(wanted)


METRICS: dict[str, tuple[Score, Score]] = {
    "kv": (contained, contained_word),
    "vt": (share_contained, share_of_words),
    "mf": (first_number, equal_number),
    "passkey": (first_digits, equal_number),
    "many_shot": (any_item_contained, whole_label),
    "qa_eng": (any_contained, word_f1),
    "qa_chn": (character_f1_of_items, character_f1),
    "choice_eng": (first_letter, lone_letter),
    "repoqa": (similar_function, similar_bare_function),
    "summary": (rouge, rouge_by_sentence),
    "recall": (hops, hops),
}


def _text(answer: Answer) -> str:
    return str(answer[0]) if isinstance(answer, list) else str(answer)


def _list(answer: Answer) -> list[str]:
    return [str(a) for a in answer] if isinstance(answer, list) else [str(answer)]


def _items(answer: Answer) -> Sequence[str]:
    """What a loop over the label sees: the letters of a label that is a text."""
    return answer if isinstance(answer, str) else _list(answer)


def _choices(answer: Answer, options: Sequence[str]) -> list[str]:
    """The letter, and the option's text."""
    given = _list(answer)
    both = [
        (letter, option)
        for letter, option in zip("ABCD", options, strict=False)
        if letter in given or option in given
    ]
    return list(dict.fromkeys([*given, *(label for pair in both for label in pair)]))


def _stands_alone(label: str, text: str) -> bool:
    return bool(label) and re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text) is not None


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", text).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _bleu(wanted: str, found: str) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if len(found.split()) < 2:
        return float(found.split() == wanted.split())
    smooth = SmoothingFunction().method4
    return float(sentence_bleu([wanted.split()], found.split(), smoothing_function=smooth))


def _bare(source: str) -> str:
    """Python without comments, docstrings and layout; other text as it is."""
    try:
        tree = ast.parse(textwrap.dedent(source))
    except (SyntaxError, ValueError):
        return _without_comments(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[index]
    return ast.unparse(tree)


def _without_comments(source: str) -> str:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return source
    return tokenize.untokenize(t for t in tokens if t.type != tokenize.COMMENT)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=False)


def _rouge_lsum(prediction: str, answer: str) -> float:
    return float(_rouge_scorer().score(answer, prediction)["rougeLsum"].fmeasure)
