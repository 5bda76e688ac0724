"""BLEU, ROUGE-L and CIDEr-D on tokenised text, equal to pycocoevalcap 1.2.

Our own because pycocoevalcap needs Java even to import its scorers' tokenizer, writes into its own
installation, and divides by zero on odd corpora; the definitions are a few lines each. References
and predictions are tokens joined by single spaces; `references[i]` are those of prediction i.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 4
SIGMA = 6.0  # of CIDEr-D's penalty on the difference in length
BETA = 1.2  # of ROUGE-L: weight of recall

References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Scored:
  """A metric of the corpus, and of each item."""

  corpus: float
  items: tuple[float, ...]


def ngrams(text: str, orders: int = ORDERS) -> Counter[tuple[str, ...]]:
  """Counts of the n-grams, n = 1 .. orders."""
  words = text.split()
  return Counter(
    tuple(words[i : i + n]) for n in range(1, orders + 1) for i in range(len(words) - n + 1)
  )


def bleu(references: References, predictions: Sequence[str]) -> list[Scored]:
  """BLEU-1 .. BLEU-4; a corpus score comes of summed counts."""
  per_item = [bleu_counts(r, p) for r, p in zip(references, predictions, strict=True)]
  items = np.array([bleu_from_counts(*counts) for counts in per_item]).reshape(-1, ORDERS)
  corpus = [0.0] * ORDERS
  if per_item:
    matches, guesses, lengths, closest = zip(*per_item, strict=True)
    sums = np.sum(matches, axis=0), np.sum(guesses, axis=0)
    corpus = bleu_from_counts(*sums, sum(lengths), sum(closest))
  return [Scored(float(corpus[n]), tuple(float(v) for v in items[:, n])) for n in range(ORDERS)]


def bleu_counts(
  references: Sequence[str], prediction: str
) -> tuple[np.ndarray, np.ndarray, int, int]:
  """Matches and guesses by order, length of the prediction and of the closest reference."""
  length = len(prediction.split())
  most: Counter[tuple[str, ...]] = Counter()
  for reference in references:
    most |= ngrams(reference)
  matches = np.zeros(ORDERS)
  for gram, count in ngrams(prediction).items():
    matches[len(gram) - 1] += min(count, most[gram])
  guesses = np.maximum(0, length - np.arange(ORDERS)).astype(float)
  lengths = [len(reference.split()) for reference in references]
  closest = min(lengths, key=lambda r: (abs(r - length), r))
  return matches, guesses, length, closest


def bleu_from_counts(
  matches: np.ndarray, guesses: np.ndarray, length: int, reference: int
) -> list[float]:
  tiny, small = 1e-15, 1e-9  # so that nothing is divided by zero
  ratio = (length + tiny) / (reference + small)
  penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
  product, out = 1.0, []
  for n in range(ORDERS):
    product *= (float(matches[n]) + tiny) / (float(guesses[n]) + small)
    out.append(product ** (1 / (n + 1)) * penalty)
  return out


def rouge_l(references: References, predictions: Sequence[str]) -> Scored:
  """F-measure of the longest common subsequence; mean over items."""
  items = tuple(_rouge(r, p) for r, p in zip(references, predictions, strict=True))
  return Scored(float(np.mean(np.array(items))) if items else 0.0, items)


def _rouge(references: Sequence[str], prediction: str) -> float:
  words = prediction.split(" ")  # an empty text is one empty word, as in pycocoevalcap
  common = [
    (_longest(reference.split(" "), words), reference.split(" ")) for reference in references
  ]
  precision = max(n / len(words) for n, _ in common)
  recall = max(n / len(reference) for n, reference in common)
  if not precision or not recall:
    return 0.0
  return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest(a: Sequence[str], b: Sequence[str]) -> int:
  """Length of the longest common subsequence.

  No words at all are one empty word to pycocoevalcap, so "" against "" is alike.
  """
  row = [0] * (len(b) + 1)
  for x in a:
    before = 0
    for j, y in enumerate(b, 1):
      before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
  return row[-1]


def cider_d(references: References, predictions: Sequence[str]) -> Scored:
  """CIDEr-D: clipped tf-idf similarity of n-grams, document frequencies from the references.

  A corpus of one item scores 0: every n-gram is in every document.
  """
  counted = [[ngrams(reference) for reference in texts] for texts in references]
  frequency: Counter[tuple[str, ...]] = Counter()
  for grams in counted:
    frequency.update({gram for reference in grams for gram in reference})
  log_items = math.log(float(len(references))) if references else 0.0

  def vector(counts: Counter[tuple[str, ...]]):
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
    norms, bigrams = np.zeros(ORDERS), 0
    for gram, count in counts.items():
      idf = log_items - math.log(max(1.0, frequency[gram]))
      n = len(gram) - 1
      weights[n][gram] = float(count) * idf
      norms[n] += weights[n][gram] ** 2
      bigrams += count if n == 1 else 0
    return weights, np.sqrt(norms), bigrams

  items = []
  for grams, prediction in zip(counted, predictions, strict=True):
    ours, our_norms, our_length = vector(ngrams(prediction))
    score = np.zeros(ORDERS)
    for reference in grams:
      theirs, their_norms, length = vector(reference)
      delta = float(our_length - length)
      for n in range(ORDERS):
        value = sum(
          min(weight, theirs[n].get(gram, 0.0)) * theirs[n].get(gram, 0.0)
          for gram, weight in ours[n].items()
        )
        if our_norms[n] and their_norms[n]:
          value /= our_norms[n] * their_norms[n]
        score[n] += value * math.e ** (-(delta**2) / (2 * SIGMA**2))
    items.append(float(np.mean(score) / max(len(grams), 1) * 10.0))
  return Scored(float(np.mean(items)) if items else 0.0, tuple(items))
