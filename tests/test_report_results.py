"""`vr report`: the page and the table of scored runs."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_report import Page
from test_score import RUN, prediction, result_of

from data_pipes.errors import InputError
from data_pipes.masks import encode_mask
from vr_jax import cli
from vr_jax.evaluation.benchmarks.registry import benchmark
from vr_jax.evaluation.benchmarks.videorefer import TYPE_SIZES
from vr_jax.evaluation.pages.results import bar_rows, filled, headline_table, write_reports
from vr_jax.evaluation.results import save
from vr_jax.evaluation.score import JudgeSettings, score
from vr_jax.evaluation.scoring.judge_scores import DIMENSIONS
from vr_jax.evaluation.settings import ReportOptions

TYPES = ("Basic Questions", "Sequential Questions")


@pytest.fixture
def bench(tmp_path):
  """A Bench-Q file of two videos (folders of frames) and where it lies."""
  mask = np.zeros((48, 64), np.uint8)
  mask[10:30, 20:40] = 1
  items = []
  for i in range(8):
    video = tmp_path / "data" / f"v{i // 2}"
    video.mkdir(parents=True, exist_ok=True)
    for f in range(3):
      Image.new("RGB", (64, 48), (40 * i, 90, 30 * f)).save(video / f"{f:03}.png")
    annotation = {str(f): {"segmentation": encode_mask(mask)} for f in range(3)}
    items.append(
      {
        "id": i,
        "video": video.name,
        "Question": "What colour has <object2><region> & why?",
        "type": TYPES[i % 2],
        "options": ["(A) red", "(B) blue", "(C) green", "(D) none"],
        "Answer": "(A) red",
        "frame_idx": "1",
        "annotation": [annotation],
      }
    )
  path = tmp_path / "data" / "bench_q.json"
  path.write_text(json.dumps(items))
  return path


def save_result(folder, letters, data=None, mode="multi"):
  result = result_of([prediction(i, f"({x})", kind=TYPES[i % 2]) for i, x in enumerate(letters)])
  result.run["task"]["data"] = [str(data)] if data else []
  result.run["inference"]["mode"] = mode
  result = type(result)(**{**vars(result), "run": json.loads(json.dumps(result.run))})
  save(result, folder)
  return result


def page_of(folder):
  text = (folder / "report.html").read_text(encoding="utf-8")
  return text, Page(text)


def test_the_page_holds_the_numbers_and_the_papers(tmp_path, bench):
  save_result(tmp_path / "a" / "strict", "AAAAABBB", bench)
  save_result(tmp_path / "b" / "strict", "BAAABBBB", bench, "single")
  assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)]) == 0
  text, page = page_of(tmp_path)
  outside = re.sub(r"data:image/[a-z]+;base64,[\w+/=]+", "", text)
  assert not re.search(r"//\s*\w|url\(|@import|<link", outside)
  assert "62.5 30.6 – 86.3" in page.text  # 5 of 8, Wilson
  assert not page.all("tr", "paper")  # eight items are not the published file's
  assert "the items (8) are not those of the published file" in page.text
  assert "71.9" not in page.text
  widths = [float(a["width"].rstrip("%")) for a in page.all("rect", "value")]
  assert widths == [75.0, 25.0, 50.0, 50.0, 62.5, 37.5]
  assert not page.all("line", "chance")
  assert "Run against run" in page.text
  assert "+25.0" in page.text
  assert len(page.all("article", "wrong")) == 3
  assert len(page.all("img")) == 8 * 6
  assert "<object2>" in page.text
  assert "sha256 0000000000000000" in page.text
  table = (tmp_path / "report.md").read_text()
  assert "| **m: multi-frame, 16 scene frames, strict parser** | **62.5** (30.6 – " in table
  assert "| **m: single-frame, 16 scene frames, strict parser** | 37.5 (" in table
  assert "from the VideoRefer paper" not in table
  assert "| Value | 95 %, Wilson | 95 %, by video | n |" in table
  assert "| First | Second | Difference | 95 %, by video | McNemar p | Holm | n | So |" in table


def test_single_frame_mode_shows_its_frame(tmp_path, bench):
  save_result(tmp_path / "a", "AAAAAAAA", bench, "single")
  write_reports([tmp_path / "a"], tmp_path)
  _, page = page_of(tmp_path)
  assert [a["alt"] for a in page.all("img")] == ["frame 1, object 0 marked"] * 8


def test_without_the_data_there_are_no_pictures_and_the_page_says_so(tmp_path):
  save_result(tmp_path / "a", "AABB", tmp_path / "gone.json")
  write_reports([tmp_path / "a"], tmp_path)
  _, page = page_of(tmp_path)
  assert not page.all("img")
  assert "no pictures" in page.text
  assert "gone.json" in page.text


def test_judged_descriptions(tmp_path):
  path = tmp_path / "d.jsonl"
  records = [
    {"video": f"v{i}", "caption": "A red dog runs.", "pred": said}
    for i, said in enumerate(("A red dog runs.", "<script>alert(1)</script>", ""))
  ]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  _, folder = score("bench-d", path, judge=JudgeSettings(spec="rule"))
  write_reports([folder], tmp_path)
  text, page = page_of(tmp_path)
  assert "<script>alert" not in text
  assert "not comparable" in page.text
  assert "empty prediction" in page.text
  assert "words in common" in page.text  # the judge's own words
  assert len(page.all("article", "text")) == 3
  assert len(page.all("svg")) == 5 + 4  # bars, and a histogram for each dimension
  assert "4.440" not in page.text  # of 400 items, not of these three
  # A column that no row fills is left out: means of scores have no Wilson interval.
  assert "| Value | 95 %, by video | n |" in (tmp_path / "report.md").read_text()
  assert "Wilson" not in text


def published_items(**changes):
  """Predictions with the ids, types and videos of the published Bench-Q."""
  sizes = zip(TYPE_SIZES, TYPE_SIZES.values(), strict=True)
  types = [name for name, count in sizes for _ in range(count)]
  return [
    prediction(i, kind=kind, **{"video": f"DAVIS/JPEGImages/480p/v{i % 50}", **changes})
    for i, kind in enumerate(types)
  ]


def test_the_papers_rows_stand_beside_the_published_files_items_alone():
  bench = benchmark("bench-q")
  whole = result_of(published_items())
  columns, lines = headline_table(bench, [whole], [whole.label])
  assert [line.paper for line in lines] == ["", "VideoRefer paper", "VideoRefer paper"]
  assert [c.text for c in lines[1].cells][columns.index("All")] == "71.9"
  assert [c.best for c in lines[0].cells] == [True] * 6  # all right
  assert bar_rows(bench, [whole], ["a"])[0][1][0].reference is None  # there is no multi-frame row
  for items in (
    published_items()[:-1],
    published_items(video="videos/7.mp4"),  # the embedded set with as many questions
    [dataclasses.replace(p, id=p.id + 5) for p in published_items()],
    [dataclasses.replace(p, type="Basic Questions") for p in published_items()],
  ):
    result = result_of(items)
    assert not [line for line in headline_table(bench, [result], ["a"])[1] if line.paper]


def test_a_limited_run_says_so_and_names_its_model(tmp_path, bench, capsys):
  save_result(tmp_path / "a", "AABB", bench)
  content = json.loads((tmp_path / "a" / "result.json").read_text())
  content["task"]["items_in_file"] = 8
  content["model"]["name"] = "runs/checkpoints/mine"
  (tmp_path / "a" / "result.json").write_text(json.dumps(content))
  write_reports([tmp_path / "a"], tmp_path)
  table = (tmp_path / "report.md").read_text()
  assert "| **mine: multi-frame, 16 scene frames, 4 of 8 (--limit), strict parser** |" in table
  assert "Benchmark: bench-q, 4 of 8 (--limit) items" in table
  assert "4 of 8 (--limit) items" in page_of(tmp_path)[1].text


def test_every_table_as_latex_and_csv_with_the_best_value_marked(tmp_path, bench):
  save_result(tmp_path / "a" / "strict", "AAAAABBB", bench)
  save_result(tmp_path / "b" / "strict", "BAAABBBB", bench, "single")
  command = ["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "r")]
  assert cli.main([*command, "--format", "latex"]) == 0
  text = (tmp_path / "r" / "report.tex").read_text()
  assert text.count(r"\begin{tabular}") == text.count(r"\end{table}") == 4  # with the difference
  assert (
    r"m: multi-frame, 16 scene frames, strict parser & \textbf{62.5} & \textbf{75.0} & "
    r"\textbf{50.0} \\" in text  # as good as the other
  )
  assert r"62.5 \%" in text
  assert cli.main([*command, "--format", "csv"]) == 0
  files = sorted((tmp_path / "r" / "tables").iterdir())
  assert [file.name[0] for file in files] == ["1", "2", "3", "4"]
  rows = list(csv.DictReader(files[0].open(encoding="utf-8")))
  assert [row["All"] for row in rows] == ["62.5", "37.5"]
  assert [row["best"] for row in rows] == [
    "All; Basic Questions; Sequential Questions",
    "Sequential Questions",
  ]
  assert files[3].read_text().split("\n")[0].split(",")[1:4] == [
    "First",
    "Second",
    "Difference",
  ]
  with pytest.raises(InputError, match="accepted: html, latex, csv"):
    write_reports([tmp_path / "a"], tmp_path, ReportOptions(format="pdf"))


def test_tables_hold_the_columns_that_are_filled():
  rows = [{"name": "a", "p": "", "n": "1"}, {"name": "b", "p": "", "n": ""}]
  assert filled((("P", "p"), ("N", "n")), rows) == [("N", "n")]


def test_descriptions_that_no_judge_scored_come_first(tmp_path):
  path = tmp_path / "d.json"
  said = ("no numbers here", "\n".join(f"{i}. {n}: 4" for i, n in enumerate(DIMENSIONS, 1)))
  records = [{"video": "v", "caption": "A dog.", "pred": "A cat.", "gpt": reply} for reply in said]
  path.write_text(json.dumps(records))
  _, folder = score("bench-d", path, judge=JudgeSettings(max_failed=1.0))
  write_reports([folder], tmp_path)
  page = page_of(tmp_path)[1]
  assert len(page.all("article", "text")) == 2
  assert page.text.index("no score for Subject Correspondence") < page.text.index(
    DIMENSIONS[0] + ": 4"
  )


def test_reports_of_other_things(tmp_path):
  with pytest.raises(InputError, match="no results"):
    write_reports([tmp_path], tmp_path)
  a = save_result(tmp_path / "a", "AB")
  save(type(a)(**{**vars(a), "benchmark": "mvbench", "run": {}}), tmp_path / "b")
  with pytest.raises(InputError, match="of one benchmark a report"):
    write_reports([tmp_path / "a", tmp_path / "b"], tmp_path)
  assert RUN["task"]["n"] == 4
