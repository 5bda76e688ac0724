"""The report page: what is on it, that it stands alone, and that odd input does not break it."""

import dataclasses
import html.parser
import math
import re

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_pipes.drawing import COLOURS, _grown, colour_of, draw_objects, luminance
from vr_jax.evaluation.pages.page import (
  Example,
  Frame,
  FreeAnswer,
  LossCurve,
  ObjectSimilarity,
  Report,
  Scored,
  _chips,
  _linear_ticks,
  _log_ticks,
  _object_names,
  write_report,
)
from vr_jax.evaluation.scoring.statistics import Answered, summarize

HEIGHT, WIDTH, FRAMES = 96, 128, 16
TYPES = ("Basic", "Sequential", "Relationship", "Reasoning", "Future prediction")
OPTIONS = (
  "(A) It moves right",
  "(B) It follows <object1>",
  "(C) It stands still",
  "(D) It grows",
)


def demo_clip(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Two discs on their way: frames uint8 [F, H, W, 3], masks bool [2, F, H, W]."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:HEIGHT, :WIDTH]
  frames = np.full((FRAMES, HEIGHT, WIDTH, 3), rng.integers(90, 170, 3), np.uint8)
  frames += (rng.random((HEIGHT, WIDTH, 1)) * 12).astype(np.uint8)
  masks = np.zeros((2, FRAMES, HEIGHT, WIDTH), bool)
  for o, colour in enumerate(((225, 40, 40), (245, 220, 50))):
    start, way, radius = rng.uniform(20, 76, 2), rng.uniform(-1, 5, 2), rng.uniform(8, 16)
    for f in range(FRAMES):
      centre = start + way * f * (1, 0.6)[o]
      masks[o, f] = np.hypot(x - centre[1] % WIDTH, y - centre[0] % HEIGHT) < radius
      frames[f][masks[o, f]] = colour
  masks[0] &= ~masks[1]
  return frames, masks


def demo_frames(seed: int, ids, objects=(0, 1)) -> list[Frame]:
  frames, masks = demo_clip(seed)
  return [Frame(frames[i], {o: masks[o, i] for o in objects}, f"frame {i}") for i in ids]


def demo_scored(mode: str, shares, seed: int) -> Scored:
  rng = np.random.default_rng(seed)
  answers = [
    Answered(name, f"clip {i // 3}", bool(rng.random() < share), 4, bool(rng.random() < 0.02))
    for name, share in zip(TYPES, shares, strict=True)
    for i in range(60)
  ]
  return Scored(mode, summarize(answers))


def demo_example(i: int) -> Example:
  question = (
    f"What does <object3><region> do {'after <object1>[<region>] has passed it' if i % 3 else ''}?"
  )
  return Example(
    type=TYPES[i % 5],
    mode="Multi-frame" if i % 3 else "Single-frame",
    video=f"held_out/{i:04d}.mp4",
    frames=demo_frames(i, (1, 5, 9, 14) if i % 3 else (7,), (0, 1) if i % 3 else (0,)),
    question=question,
    options=OPTIONS,
    answer="(B)" if i % 4 else "Because <b>so</b>",
    letter="B" if i % 4 else None,
    truth="B" if i % 2 else "C",
  )


def demo_similarity(index: int) -> ObjectSimilarity:
  rng = np.random.default_rng(index)
  steps = rng.normal(0, 0.12, (FRAMES, 24))
  steps[[4, 9, 12]] += rng.normal(0, 0.9, (3, 24))
  walk = rng.normal(0, 1, 24) + steps.cumsum(0)
  unit = walk / np.linalg.norm(walk, axis=1, keepdims=True)
  segments = np.searchsorted([4, 9, 12], np.arange(FRAMES), side="right")
  frames = demo_frames(3 + index, range(FRAMES), (index,))
  name = ("small red plain ball", "large yellow dotted ring")[index]
  return ObjectSimilarity(name, index, frames, unit @ unit.T, segments)


def demo_report() -> Report:
  rng = np.random.default_rng(0)
  curves = []
  for stage, n, high, low in (
    ("Stage 1: connector", 40, 3.0, 1.4),
    ("Stage 2: region encoder", 60, 1.5, 0.7),
    ("Stage 3: all but the tower", 200, 2.0, 0.02),
  ):
    losses = high * np.exp(-3 * np.arange(n) / n) * rng.uniform(0.9, 1.1, n) + low
    curves.append(LossCurve(stage, range(0, 10 * n, 10), losses))
  return Report(
    checkpoint="vr-mini (quickstart, step 1200)",
    date="2025-11-23",
    minutes=9.4,
    scored=[
      demo_scored("Single-frame", (0.95, 0.3, 0.5, 0.4, 0.33), 1),
      demo_scored("Multi-frame", (0.96, 0.6, 0.62, 0.48, 0.42), 2),
    ],
    tokens_per_object=4,
    curves=curves,
    examples=[demo_example(i) for i in range(8)],
    similarities=[demo_similarity(0), demo_similarity(1)],
    free=FreeAnswer(
      demo_frames(5, (2, 6, 10, 14), (0,)),
      "What is <region> doing, and where does it go?",
      "The small red ball moves down past the yellow ring and leaves the picture at the bottom.",
    ),
    provenance={
      "vr_jax": "0.1.0",
      "JAX": "0.10.2, cpu, 2 threads",
      "Seed": 42,
      "Scene frames": "16, uniform rule; mask frames: all annotated",
      "Parser": "strict",
      "Held-out set": "60 videos, 300 questions, sha256 3f5c…91",
    },
    config='{"model_name": "vr-mini",\n "seed": 42}',
    notes=["This is a demonstration model. It knows the simulated videos it was trained on."],
  )


class Page(html.parser.HTMLParser):
  """Collects tags, attributes and text; fails on tags that are not closed in order."""

  VOID = ("meta", "img", "rect", "line", "path", "br", "link")

  def __init__(self, text):
    super().__init__()
    self.stack, self.tags, self.texts = [], [], []
    self.feed(text)
    assert not self.stack, self.stack

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.stack.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)

  def all(self, tag, cls=None):
    return [a for t, a in self.tags if t == tag and (not cls or cls in a.get("class", "").split())]

  @property
  def text(self):
    return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
  path = write_report(tmp_path_factory.mktemp("report") / "sub" / "report.html", demo_report())
  return path.read_text(encoding="utf-8")


def test_page_stands_alone(demo):
  page = Page(demo)
  without_images = re.sub(r"data:image/[a-z]+;base64,[\w+/=]+", "", demo)
  assert not re.search(r"//\s*\w|url\(|@import", without_images)
  images = page.all("img")
  assert len(images) > 40
  assert all(a["src"].startswith("data:image/") and a["alt"] for a in images)
  assert "link" not in {t for t, _ in page.tags}
  assert len(demo) < 2_000_000


def test_page_shows_the_numbers(demo):
  report, page = demo_report(), Page(demo)
  for scored in report.scored:
    for a in (*scored.summary.types, scored.summary.micro):
      assert f"{a.name} " in f"{page.text} "
      assert f"{100 * a.value:.1f} %" in page.text
      assert f"{100 * a.wilson.low:.1f}–{100 * a.wilson.high:.1f}" in page.text
      assert f"{100 * a.by_video.low:.1f}–{100 * a.by_video.high:.1f}" in page.text
  widths = [float(a["width"].rstrip("%")) for a in page.all("rect", "value")]
  expected = [100 * s.summary.types[i].value for i in range(5) for s in report.scored] + [
    100 * s.summary.micro.value for s in report.scored
  ]
  assert widths == pytest.approx(expected, abs=0.01)
  assert {a["x1"] for a in page.all("line", "chance")} == {"25.00%"}
  assert "demonstration model" in page.text


def test_page_marks_truth_and_answer(demo):
  page = Page(demo)
  assert len(page.all("article", "right")) == sum(e.correct for e in demo_report().examples) > 0
  assert len(page.all("article", "wrong")) == 8 - len(page.all("article", "right"))
  assert len(page.all("li", "truth")) == 8
  assert len(page.all("li", "said")) == 6  # two answers could not be read
  assert "no option could be read" in page.text
  assert "<b>so</b>" not in demo
  assert "Because <b>so</b>" in page.text


def test_strip_has_the_cells_cuts_and_tokens(demo):
  page = Page(demo)
  assert len(page.all("div", "cell")) == 2 * (FRAMES - 1)
  assert len(page.all("div", "cut")) == 2 * 3
  assert [a["style"] for a in page.all("div", "cut")][:3] == [
    f"grid-column: {2 * i + 2}" for i in (3, 8, 11)
  ]
  assert len(page.all("div", "token")) == 2 * 4
  assert "token 1: 4 frames" in page.text
  similarity = demo_report().similarities[0]
  assert f"{np.diagonal(similarity.matrix, 1)[0]:.2f}" in page.text


def test_empty_parts_are_left_out(tmp_path):
  report = dataclasses.replace(
    demo_report(), curves=(), examples=(), similarities=(), free=None, provenance={}, config=""
  )
  page = Page(write_report(tmp_path / "r.html", report).read_text())
  assert not page.all("section", None)[1:]  # the accuracies alone
  bare = dataclasses.replace(report, scored=())
  assert not Page(write_report(tmp_path / "r.html", bare).read_text()).all("section")
  assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_odd_input_still_gives_a_page(tmp_path):
  one = demo_frames(0, (3,), (0,))
  hidden = Frame(one[0].image, {0: np.zeros((HEIGHT, WIDTH), bool)}, "not seen")
  report = dataclasses.replace(
    demo_report(),
    curves=[
      LossCurve("nothing", [], []),
      LossCurve("not finite", [0, 1], [math.nan, math.inf]),
      LossCurve("one", [7], [2.0]),
      LossCurve("flat", range(3), [1.0] * 3),
      LossCurve("to zero", range(3), [1.0, 0.0, 0.0]),
    ],
    similarities=[
      ObjectSimilarity("one frame", 0, one, np.ones((1, 1)), [0]),
      ObjectSimilarity("equal", 9, [one[0], hidden], np.ones((2, 2)), [0, 0]),
    ],
    examples=[dataclasses.replace(demo_example(1), options=["red", "blue"], question="no tag")],
  )
  text = Page(write_report(tmp_path / "r.html", report).read_text()).text
  assert "No finite loss was logged" in text
  assert "nan" not in text.replace("finance", "")


def test_object_names_follow_the_order_of_regions():
  question = "<object3><region>, <object1>[<region>] and <region>: does <object1> hit <object3>?"
  assert _object_names(question) == {"3": 0, "1": 1}
  chips = re.findall(r">(\d)</b>(&lt;object\d&gt;)", _chips(question, _object_names(question)))
  expected = ((0, 3), (1, 1), (2, 2), (1, 1), (0, 3))
  assert chips == [(str(i), f"&lt;object{n}&gt;") for i, n in expected]
  assert _chips("<object7> & <b>", {"1": 0}) == "&lt;object7&gt; &amp; &lt;b&gt;"


def test_ticks_hold_the_values():
  for high in (0.003, 0.9, 1.0, 3.3, 47, 1000):
    ticks = _linear_ticks(high)
    assert ticks[0] == 0
    assert ticks[-1] >= high > ticks[-2]
    assert 3 <= len(ticks) <= 7
  for low, high in ((0.02, 2.1), (0.5, 11), (1e-4, 8)):
    ticks = _log_ticks(low, high)
    assert ticks[0] <= low < high <= ticks[-1]


def test_overlay_marks_the_object_and_nothing_else():
  frames, masks = demo_clip(1)
  both = {0: masks[0, 2], 1: masks[1, 2]}
  drawn = np.asarray(draw_objects(frames[2], both, WIDTH, numbers=False))
  np.testing.assert_array_equal(np.asarray(draw_objects(frames[2], {}, WIDTH)), frames[2])
  y, x = np.nonzero(masks[:, 2].any(0))
  outside = np.ones((HEIGHT, WIDTH), bool)
  for dy in range(-4, 5):
    for dx in range(-4, 5):
      outside[np.clip(y + dy, 0, HEIGHT - 1), np.clip(x + dx, 0, WIDTH - 1)] = False
  np.testing.assert_array_equal(drawn[outside], frames[2][outside])
  for o in (0, 1):
    line = np.array([int(colour_of(o)[i : i + 2], 16) for i in (1, 3, 5)])
    assert (drawn == line).all(-1).sum() > 20  # its outline
    before, after = frames[2][masks[o, 2]].astype(float), drawn[masks[o, 2]].astype(float)
    assert np.abs(after - line).mean() < 0.9 * np.abs(before - line).mean()


@pytest.mark.parametrize("pixels", [1, 6, 20])
def test_masks_grow_as_by_a_maximum_filter(pixels):
  rng = np.random.default_rng(pixels)
  mask = np.zeros((60, 80), np.uint8)
  mask[rng.integers(0, 60, 6), rng.integers(0, 80, 6)] = 255
  grown = _grown(Image.fromarray(mask), pixels)
  expected = Image.fromarray(mask).filter(ImageFilter.MaxFilter(2 * pixels + 1))
  np.testing.assert_array_equal(np.asarray(grown), np.asarray(expected))


def test_overlay_scales_and_skips_empty_masks():
  frames, masks = demo_clip(1)
  image = draw_objects(frames[0], {0: np.zeros_like(masks[0, 0])}, 64)
  assert image.size == (64, 48)
  assert draw_objects(frames[0], {0: masks[0, 0].astype(np.uint8)}, 320).size == (320, 240)
  assert draw_objects(frames[0][:, :1], {}, 40).size == (40, 3840)
  assert colour_of(0) == colour_of(len(COLOURS))
  assert luminance("#ffffff") == pytest.approx(1)
  assert luminance("#000000") == 0
