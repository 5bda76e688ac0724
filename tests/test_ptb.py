"""The Python tokenizer by recorded tokens of Stanford's program, and against it where Java is."""

import random

import pytest

from vr_jax.evaluation.scoring.captions import jar_tokenize, ours
from vr_jax.evaluation.scoring.ptb import one_line, tokenize

# Text and what pycocoevalcap 1.2's jar makes of it, punctuation left out (2026-11-24, Java 17).
RECORDED = (
  (
    "He can't go; they won't, don't cannot gonna 'tis",
    "he ca n't go they wo n't do n't can not gon na 't is",
  ),
  (
    "The man's dogs' toys, I'm, you're, we've, he'll, she'd",
    "the man 's dogs toys i 'm you 're we 've he 'll she 'd",
  ),
  (
    "he'd've shouldn't've o'clock O'Brien ma'am y'all",
    "he 'd 've should n't 've o'clock o'brien ma'am y' all",
  ),
  ("don’t it’s “quoted” ‘single’", "do n't it 's quoted single"),
  (
    "Mr. Smith, Dr. No and St. Ives at 5 p.m. in the U.S.",
    "mr. smith dr. no and st. ives at 5 p.m. in the u.s.",
  ),
  ("No. 5 says no. No way, etc.", "no. 5 says no no way etc."),
  (
    "well-known t-shirt, 5-year-old, and/or, he/she, 1/2 a - b -- c — d",
    "well-known t-shirt 5-year-old and/or he/she 1/2 a b c d",
  ),
  (
    "$5.50 or 5% of 1,000,000 at 5:30pm, 3.5m, 10ft, 1990s, '90s",
    "$ 5.50 or 5 % of 1,000,000 at 5:30 pm 3.5 m 10ft 1990s '90s",
  ),
  ("(a) [b] {c} <region> \"d\" ''e''", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- <region> d e"),
  ("wait... what?! no!! hm! .. …", "wait what ?! no !! hm"),
  (
    "R&B, black & white, www.foo.org, me@x.com #tag end.Next",
    "r&b black & white www.foo.org me@x.com #tag end.next",
  ),
  (
    "U.K.-based, a U.S.-led team, e.g.-based, Ph.D.-level, Jan.-Feb. St.-like, J.K.Rowling",
    "u.k.-based a u.s.-led team e.g.-based ph.d.-level jan.-feb st.-like j.k.rowling",
  ),
  (
    "C'mon c'mon C'est ne'er Hawai'i ol' man L'Oreal y'all I'VE HE'S ma'am and-L'Oreal",
    "c'mon c'mon c'est ne'er hawai'i ol' man l'oreal y' all i 've he 's ma'am and-l'oreal",
  ),
  ("rock'n'roll, fish'n'chips, rock 'n' roll", "rock 'n' roll fish 'n' chips rock 'n' roll"),
  (
    "$12.5-15 or $12.5-$15, 12.5-15, $5-10, 1,000-2,000, 3.5-4.5, 5ft.-tall, fig. 3, ½ cup",
    "$ 12.5-15 or $ 12.5 $ 15 12.5-15 $ 5-10 1,000-2 ,000 3.5-4 .5 5ft.-tall fig. 3 1/2 cup",
  ),
  ("naïve café 日本語 £5 €10 20°C star*", "naïve café 日本語 # 5 $ 10 20 ° c star *"),
)
WORDS = (
  "the a man woman's dog dogs' James it's isn't can't they're o'clock t-shirt well-known "
  "5-year-old 3 10 2.5 1,000 5:30 10ft 5% $20 1990s 2nd and/or he/she cannot Mr. St. U.S. p.m. "
  "e.g. café U.K.-based C'mon rock'n'roll $12.5-15 St.-like Hawai'i "
  "red-and-white blue running quickly <region> mother-in-law's we'll I'd shouldn't"
).split()
MARKS = ("", "", "", "", ",", ".", ";", ":", "!", "?", "...", "!!", " -", " --", " —", "\u2028")
AROUND = (("", ""),) * 8 + (("(", ")"), ('"', '"'), ("“", "”"), ("[", "]"), ("'", "'"))


def captions(count, seed=0):
  """Random captions of what captions are made of."""
  rng = random.Random(seed)

  def phrase():
    before, after = rng.choice(AROUND)
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
    return f"{before}{words}{after}{rng.choice(MARKS)}"

  return [" ".join(phrase() for _ in range(rng.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize(("text", "tokens"), RECORDED)
def test_recorded_tokens(text, tokens):
  assert ours([text]) == [tokens]


def test_line_ends_within_a_caption_are_spaces():
  for end in ("\u2028", "\u2029", "\x85", "\n", "\r\n", "\x0b", "\x00"):
    assert one_line(f"a{end}b") == "a b"
    assert tokenize(f"A{end}cup. ") == ["a", "cup", "."]
  assert ours(["", "...", " \u2028 "]) == ["", "", ""]


@pytest.mark.java
def test_equal_to_the_program():
  recorded = [text for text, _ in RECORDED]
  assert jar_tokenize(recorded) == [tokens for _, tokens in RECORDED]
  texts = captions(3000)
  different = [
    (text, a, b)
    for text, a, b in zip(texts, ours(texts), jar_tokenize(texts), strict=True)
    if a != b
  ]
  assert not different, different[:3]
