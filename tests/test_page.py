"""One frame, style sheet and bar for every page of the product."""

from pathlib import Path

import pytest

from data_pipes import page

ROOT = Path(__file__).parents[1]
FRAME = ROOT / "data_pipes" / "templates" / "page.html.j2"
PARTS = ("page.html.j2", "parts.html.j2", "questions.html.j2")  # no pages
PAGES = sorted(p for p in ROOT.glob("*/**/*.html*") if p.parent.name == "templates")


def test_the_pages_are_all_here():
  names = {p.name.partition(".")[0] for p in PAGES if p.name not in PARTS}
  assert names == {
    "report", "results", "sweep", "stats", "show", "engine_report", "engine_review",
  }  # fmt: skip
  strays = {p for p in ROOT.glob("*/**/*.html*") if {"vr_jax", "data_pipes"} & set(p.parts)}
  assert strays == set(PAGES)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_a_page_extends_the_frame(path):
  text = path.read_text(encoding="utf-8")
  if path == FRAME:
    assert text.count('<meta name="viewport"') == text.count('{% include "page.css" %}') == 1
  else:
    assert not any(word in text for word in ("<style", "<head>", "viewport"))
    assert path.name in PARTS or text.startswith('{% extends "page.html.j2" %}')


def test_bars_of_counts():
  bars = page.count_bars({"a": 3, 7: 1}, shares=True)
  assert [(b.name, b.value, b.text) for b in bars] == [
    ("a", 1.0, "3 (75.0%)"),
    ("7", 1 / 3, "1 (25.0%)"),
  ]
  assert page.count_bars({}) == []
  content = {"items": 4, "readable": 4, "files": ["<f>.json"], "figures": [("T & U", bars)]}
  text = page.render("stats.html.j2", **content)
  assert 'width="33.33%"' in text
  assert "&lt;f&gt;.json" in text
  assert "T &amp; U" in text
