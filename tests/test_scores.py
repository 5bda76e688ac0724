"""Judge replies to scores: the published parser against recorded runs, the strict one by cases."""

import json
import re

import pytest

from vr_jax.evaluation.scoring.judge_scores import (
  DIMENSIONS,
  Scores,
  mean_scores,
  published_scores,
  strict_scores,
)


@pytest.fixture(scope="module")
def recorded(golden):
  return json.loads((golden / "json" / "bench_d_scoring.json").read_text())


def test_published_scores_equal_the_recorded_run_per_item(recorded):
  assert len(recorded["items"]) > 20
  for item in recorded["items"]:
    reply = None if item["gpt"] == "<<missing key>>" else item["gpt"]
    scores = published_scores(reply)
    assert (scores.error is not None) == item["dropped"], item
    assert dict(scores.values) == (item["scores"] or {}), item
    # Upstream divides by zero where a dimension has no items.
    average = mean_scores([] if item["dropped"] else [scores]).average
    assert (average is None) == (item["analyze_error"] is not None), item


@pytest.mark.parametrize(("part", "count"), [("whole", None), ("first6", 6)])
def test_published_means_equal_the_recorded_run_to_the_last_bit(recorded, part, count):
  items = [published_scores(i.get("gpt")) for i in recorded["input"][:count]]
  result = mean_scores(items)
  printed = recorded[part]["analyze_stdout"]
  for dimension in result.dimensions:
    assert f"{dimension.name} :  {dimension.mean}\n{dimension.n}\n" in printed
  assert f"all....\n{result.average}\n" in printed
  errors = re.search(r"error num:\s+(\d+)", recorded[part]["extract_stdout"])
  assert result.failed == (int(errors[1]) if errors else 0)
  assert result.total == len(items)


def reply(*scores, form="{i}. {name}: {score}", join="\n"):
  pairs = enumerate(zip(DIMENSIONS, scores, strict=True), 1)
  return join.join(form.format(i=i, name=name, score=score) for i, (name, score) in pairs)


@pytest.mark.parametrize(
  "form",
  [
    "{i}. {name}: {score}",
    "{i}. **{name}**: {score}",
    "**{i}. {name}:** {score}\nExplanation: it matches 3 of 4 items.",
    "{i}) {name} : **{score}**",
    "- {name} = {score}/5",
    "{name}:\n{score}",
    "### {name} (of 5): Score: {score}.",
    "| {name}: | {score} |",
    "{i}.{name}:{score}\\nExplanation: literal backslash n",
  ],
)
def test_strict_parser_finds_the_names_in_any_markup(form):
  text = reply(5, 4, 2, 0, form=form)
  assert list(strict_scores(text).values.values()) == [5, 4, 2, 0], strict_scores(text).error
  assert list(strict_scores(text.lower()).values.values()) == [5, 4, 2, 0]


def test_strict_parser_reads_one_line_decimals_and_wide_digits():
  text = "1. Subject Correspondence: 5 2. Appearance Description: 4.5 3. Temporal Description: 2."
  assert list(strict_scores(f"{text} 4. Hallucination Detection: ５").values.values()) == [
    5,
    4.5,
    2,
    5,
  ]


@pytest.mark.parametrize(
  ("text", "error"),
  [
    (None, "no reply"),
    ("  ", "no reply"),
    ("I cannot evaluate this.", "no score for Subject"),
    (reply(5, 4, "N/A", 3), "no score for Temporal"),
    (reply(5, 4, 6, 3), "Temporal Description: 6 is not between 0 and 5"),
    (reply(-1, 4, 5, 3), "Subject Correspondence: -1 is not between"),
    (reply(5, "4/10", 5, 3), "Appearance Description: 4/10 is not between"),
    (reply("5.0.1", 4, 5, 3), "no score for Subject"),
    (reply("...", 4, 5, 3), "no score for Subject"),
    (reply(3, 3, 3, 3) + "\n" + reply(1, 3, 3, 3), "2 different scores for Subject"),
    (reply(5, "3-4", 5, 3), "no score for Appearance"),
    (reply(5, "3 – 4", 5, 3), "no score for Appearance"),
    (reply(5, "3 to 4", 5, 3), "no score for Appearance"),
    (reply(5, "3 or 4", 5, 3), "no score for Appearance"),
    (reply("5e3", 4, 5, 3), "no score for Subject"),
    (reply(5, "3,5", 5, 3), "no score for Appearance"),
    (reply(5, "80%", 5, 3), "no score for Appearance"),
    (reply(5, "4 out of 10", 5, 3), "Appearance Description: 4/10 is not between"),
    (reply(5, 5, 5, 5, form="> {i}. {name}: {score}") + "\n\nSorry, no.", "no score for Subject"),
    (reply(5, 5, 5, 5) + "\nThat is the format, but I cannot judge this video.", "a refusal"),
    ("I'm unable to rate it. The form is:\n" + reply(5, 5, 5, 5), "a refusal"),
    (reply(5, 4, 3, 2, form="{i}. {name}: {score} (reason)"), "the prompt's example"),
    ('{"Subject Correspondence": 5, "Appearance Description": 4}', "no score for Temporal"),
    (
      json.dumps(dict(zip(DIMENSIONS, (5, 4, 5e3, 3), strict=True))),
      "Temporal Description: 5000.0 is not",
    ),
    (json.dumps(dict(zip(DIMENSIONS, (5, 4, True, 3), strict=True))), "no score for Temporal"),
    (json.dumps(dict(zip(DIMENSIONS, (5, 4, "3-4", 3), strict=True))), "no score for Temporal"),
  ],
)
def test_strict_parser_refuses(text, error):
  scores = strict_scores(text)
  assert error in scores.error
  assert scores.values == {}


@pytest.mark.parametrize(
  "text",
  [
    json.dumps(dict(zip(DIMENSIONS, (5, 4, 2.5, 0), strict=True))),
    "Here it is:\n```json\n"
    + json.dumps(dict(zip(DIMENSIONS, (5, "4/5", 2.5, 0), strict=True)))
    + "\n```",
    json.dumps(
      {
        "scores": {
          n.lower().replace(" ", "_"): v for n, v in zip(DIMENSIONS, (5, 4, 2.5, 0), strict=True)
        }
      }
    ),
    json.dumps(
      {n: {"score": v, "reason": "5"} for n, v in zip(DIMENSIONS, (5, 4, 2.5, 0), strict=True)}
    ),
    json.dumps([{"name": n, "score": v} for n, v in zip(DIMENSIONS, (5, 4, 2.5, 0), strict=True)]),
    reply(5, 4, 2.5, 0, form="{i}. {name}: {score} (I cannot give more)"),
    reply(5, 4, 2.5, 0, form="{i}. {name}: {score} out of 5 - the jacket [red] is {{missing}}"),
  ],
)
def test_strict_parser_reads_json_and_reasons(text):
  assert list(strict_scores(text).values.values()) == [5, 4, 2.5, 0], strict_scores(text).error


def test_strict_parser_takes_the_line_not_the_quotation():
  text = reply(4, 3, 2, 1).replace(": 4", ": 4\nExplanation: see 2. Appearance Description: 1")
  assert strict_scores(text).values["Appearance Description"] == 3


def test_failures_lower_the_bound_and_not_the_mean():
  items = [Scores(dict.fromkeys(DIMENSIONS, 4.0)), Scores({}, "no reply")]
  result = mean_scores(items)
  assert (result.average, result.lower_bound, result.failed, result.total) == (4.0, 2.0, 1, 2)
  assert [(d.n, d.total, d.mean) for d in result.dimensions] == [(1, 2, 4.0)] * 4


def test_no_items():
  result = mean_scores([])
  assert result.average is None
  assert result.dimensions[0].mean is None
