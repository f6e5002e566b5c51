"""Scores of one answer: ``compat`` as SCBench publishes them, defects included, and ``fixed``.

Each metric takes (prediction, answer, options) to a number from 0 to 1. What ``fixed`` mends:

    kv, prefix_suffix   a label inside a longer word counts          -> whole words only
    vt                  the same, and shares are rounded to 0.01     -> whole words, not rounded
    mf, passkey         signs are lost, 3.7 counts as 3, and a label that is a number never
                        equals the text found                        -> numbers are compared
    many_shot, qa_eng   loops over the label: over the letters of a label that is a text
                                                                     -> whole label; F1 of words
    choice_eng          an answer that begins with A ("According …") is an A
                                                                     -> a letter that stands alone
    repoqa              comments and docstrings lower the similarity -> compared without them
    summary             rougeLsum without lines is rougeL            -> a sentence a line
    qa_chn, recall      nothing
"""

from __future__ import annotations

import ast
import io
import re
import string
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from kvplug_evals.scbench.schema import Answer

Score = Callable[[str, Answer, Sequence[str]], float]
SIMILAR = 0.8
CHINESE_PUNCTUATION = "！？｡。，、；：（）［］【】〔〕《》〈〉「」『』“”‘’…—～·"


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
    wanted = _list(answer)
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
    found = re.search(r"-?\d+(?:\.\d+)?", prediction.replace(",", ""))
    return float(found is not None and abs(float(found[0]) - float(label)) < 1e-6)


def first_digits(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    label = answer[0] if isinstance(answer, list) else answer
    found = re.search(r"[0-9]+", prediction)
    return float((found[0] if found else "") == label)


def any_item_contained(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    """The label is taken for a list: of a text, every single letter is an item."""
    items: Iterable[str] = [str(answer)] if isinstance(answer, (int, float)) else answer
    return float(any(item.upper() in prediction.strip().upper() for item in items))


def whole_label(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return float(any(_stands_alone(a.lower(), prediction.lower()) for a in _list(answer)))


def word_f1(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return max(_f1(_words(prediction), _words(a)) for a in _list(answer))


def character_f1(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    def characters(text: str) -> list[str]:
        drop = set(string.punctuation + CHINESE_PUNCTUATION)
        return [c for c in text.lower() if c not in drop and not c.isspace()]

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
    plain = " ".join(re.sub(r"[\n\"'.,?!{}]", " ", text).split())
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
    return _best_match(_code(prediction), _text(answer), options, lambda text: text)


def similar_bare_function(prediction: str, answer: Answer, options: Sequence[str]) -> float:
    return _best_match(_code(prediction), _text(answer), options, _bare)


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
    "qa_eng": (any_item_contained, word_f1),
    "qa_chn": (character_f1, character_f1),
    "choice_eng": (first_letter, lone_letter),
    "repoqa": (similar_function, similar_bare_function),
    "summary": (rouge, rouge_by_sentence),
    "recall": (hops, hops),
}


def _text(answer: Answer) -> str:
    return str(answer[0]) if isinstance(answer, list) else str(answer)


def _list(answer: Answer) -> list[str]:
    return [str(a) for a in answer] if isinstance(answer, list) else [str(answer)]


def _choices(answer: Answer, options: Sequence[str]) -> list[str]:
    """The letter, and the option's text."""
    labels = _list(answer)
    for letter, option in zip("ABCD", options, strict=False):
        if letter in labels or option in labels:
            labels += [letter, option]
    return list(dict.fromkeys(labels))


def _stands_alone(label: str, text: str) -> bool:
    return bool(label) and re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text) is not None


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", text).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _code(prediction: str) -> str:
    """What stands in the first code block, or everything."""
    block = re.search(r"```(?:\w+\n)?(.*?)(?:```|$)", prediction, re.DOTALL)
    return (block[1] if block else prediction).strip("\n")


def _best_match(
    found: str, wanted: str, options: Sequence[str], form: Callable[[str], str]
) -> float:
    """1 if the function meant is the most similar of all, and similar enough."""
    if not found.strip():
        return 0.0
    similar = {text: _bleu(form(text), form(found)) for text in {wanted, *options}}
    return float(similar[wanted] >= SIMILAR and similar[wanted] == max(similar.values()))


def _bleu(wanted: str, found: str) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if len(found.split()) < 2:
        return float(found.split() == wanted.split())
    smooth = SmoothingFunction().method4
    return float(sentence_bleu([wanted.split()], found.split(), smoothing_function=smooth))


def _bare(source: str) -> str:
    """Python without comments, docstrings and layout; other text as it is."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return _without_comments(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
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
