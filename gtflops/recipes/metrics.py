"""How good a text is, in percent: ROUGE, exact match and F1 as SQuAD has them, accuracy."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from gtflops.errors import InputError


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L by the package rouge-score, without stemming.

    >>> scores = rouge(["the cat sat"], ["the cat lay down"])    # 2 of 3 and 2 of 4 words; 1 of 2 and 1 of 3 pairs
    >>> {name: round(score, 1) for name, score in scores.items()}
    {'rouge1': 57.1, 'rouge2': 40.0, 'rougeL': 57.1}
    """
    _require_pairs(predictions, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError(
            "ROUGE is computed by the package rouge-score, which is not installed; pip install 'gtflops[recipes]'"
        ) from error
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), use_stemmer=False)
    scores = [
        scorer.score(reference, prediction) for reference, prediction in zip(references, predictions, strict=True)
    ]
    return {name: 100 * fmean(float(score[name].fmeasure) for score in scores) for name in names}


def exact_match_and_f1(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's: words without case, punctuation and articles, against the answer that agrees best.

    >>> exact_match_and_f1(["The Beatles!", "in 1970"], [["Beatles"], ["1969", "april 1970"]])   # F1: 1, and 1/2
    {'exact_match': 50.0, 'f1': 75.0}
    """
    _require_pairs(predictions, answers)
    pairs = list(zip(predictions, answers, strict=True))
    return {
        "exact_match": 100 * fmean(max(_words(text) == _words(one) for one in right) for text, right in pairs),
        "f1": 100 * fmean(max(_f1(_words(text), _words(one)) for one in right) for text, right in pairs),
    }


def accuracy(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Share of predictions that are the target.

    >>> accuracy(["0", "1", "1", "1"], ["0", "1", "0", "1"])
    {'accuracy': 75.0}
    """
    _require_pairs(predictions, targets)
    return {"accuracy": 100 * fmean(one == other for one, other in zip(predictions, targets, strict=True))}


def _words(text: str) -> list[str]:
    """As SQuAD's evaluation normalises an answer (Rajpurkar et al., arXiv:1606.05250)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    shared = (Counter(prediction) & Counter(answer)).total()
    return 2 * shared / (len(prediction) + len(answer))


def _require_pairs(predictions: Sequence[str], references: Sequence[object]) -> None:
    if not predictions or len(predictions) != len(references):
        raise InputError(f"{len(predictions)} texts for {len(references)} references, expected as many, at least one")
