"""Nothing of the user's is touched: what a run takes as its videos, and where it writes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipes import hub
from data_pipes.embedded import render as embedded
from data_pipes.embedded.scenes import make_scene
from data_pipes.engine import command, licences, stages
from data_pipes.engine.agents.ingest import benchmark_videos
from data_pipes.engine.agents.sources import list_sources
from data_pipes.engine.roles import model_version
from data_pipes.engine.stages import check_settings, make_graph
from data_pipes.engine.store import Store
from data_pipes.errors import InputError
from data_pipes.files import LOCK


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
  return embedded.render(make_scene(0))[0]


def write_video(path: Path, frames: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  embedded.write_video(path, frames)


def write_frames(folder: Path, frames: np.ndarray) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  for i, frame in enumerate(frames):
    Image.fromarray(frame).save(folder / f"{i:04d}.png", compress_level=1)
  return folder


def config(videos: Path, *files: Path):
  c = stages.engine_config().unlock()
  c.input.videos, c.input.files = str(videos), tuple(map(str, files))
  c.workers, c.shards = 1, 1
  return c.lock()


def names(videos: Path, *files: Path, work: Path | None = None) -> list[str]:
  work = work or videos.parent / "W"
  return [row["key"] for row in list_sources(check_settings(config(videos, *files), work))]


def content(folder: Path) -> dict[str, bytes | str]:
  """Every file below a folder, and every link as a link."""
  return {
    str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
    for p in sorted(folder.rglob("*"))
    if p.is_symlink() or p.is_file()
  }


def listed(path: Path, *videos: str) -> Path:
  path.write_text(json.dumps([{"video": v, "caption": "A ball rolls."} for v in videos]))
  return path


def test_originals_stay_whatever_lies_in_what(tmp_path, frames):
  """Frames beside their video, links to both, a link to a folder: all in one folder of videos."""
  clips = tmp_path / "CLIPS"
  write_frames(clips / "vid0", frames[:30])
  write_video(clips / "vid0" / "source.mp4", frames[:32])
  write_frames(clips / "deep" / "er", frames[:30][:, ::-1])
  write_video(clips / "deep" / "er" / "most" / "v.mp4", frames[:31])
  write_frames(clips / "only", frames[8:38])
  (clips / "link").symlink_to(clips / "vid0")
  (clips / "link.mp4").symlink_to(clips / "vid0" / "source.mp4")
  before = content(clips)
  work = clips / "W"
  command.run(config(clips), work)
  command.run(config(clips), work)  # and once more over its own links
  assert content(clips) == before | content_of_run(work, clips)
  rows = list(Store(work).rows("05_shots"))
  assert {r["source"] for r in rows} <= {
    "vid0/source.mp4",
    "deep/er/most/v.mp4",
    "only",
    "link.mp4",
  }
  assert all(Path(r["video"]).parent == Path("videos") for r in rows)
  for row in rows:
    assert (work / "media" / row["video"]).resolve().is_relative_to(clips)


def content_of_run(work: Path, clips: Path) -> dict[str, bytes | str]:
  return {f"{work.relative_to(clips)}/{name}": value for name, value in content(work).items()}


def test_a_folder_and_a_file_in_it_are_not_both_sources(tmp_path, frames):
  clips = tmp_path / "CLIPS"
  write_frames(clips / "a", frames[:2])
  write_frames(clips / "b", frames[:2])
  (clips / "b" / "sub").mkdir()
  (clips / "b" / "sub" / "v.mp4").touch()
  (clips / "c").symlink_to(clips / "b")
  assert names(clips) == ["a", "b/sub/v.mp4"]
  chosen = listed(tmp_path / "l.json", "a", "b", "b/sub/v.mp4", "c")
  assert names(clips, chosen) == ["a", "b/sub/v.mp4"]


def test_the_work_directory_is_never_a_source(tmp_path, frames):
  clips = tmp_path / "CLIPS"
  write_video(clips / "v.mp4", frames[:30])
  work = clips / "runs" / "W"
  write_frames(work / "media" / "videos" / "f", frames[:2])
  write_video(work / "media" / "clips" / "c.mp4", frames[:30])
  (clips / "z.mp4").symlink_to(work / "media" / "clips" / "c.mp4")
  (clips / "other").symlink_to(work / "media" / "videos" / "f")
  assert names(clips, work=work) == ["v.mp4"]
  for name in ("runs/W/media/clips/c.mp4", "z.mp4", "other"):
    with pytest.raises(InputError, match="lies in the work directory"):
      names(clips, listed(tmp_path / "l.json", "v.mp4", name), work=work)
  for inside in (work, work / "media"):
    with pytest.raises(InputError, match="lies in the work directory"):
      names(inside, work=work)


def test_a_list_names_videos_below_the_folder_in_any_spelling(tmp_path):
  clips, alias = tmp_path / "CLIPS", tmp_path / "alias"
  (clips / "s").mkdir(parents=True)
  (clips / "s" / "v.mp4").touch()
  (tmp_path / "out.mp4").touch()
  (clips / "away.mp4").symlink_to(tmp_path / "out.mp4")
  alias.symlink_to(clips)
  spellings = ["s/v.mp4", "./s//v.mp4", "s/../s/v.mp4", str(clips / "s" / "v.mp4"), "away.mp4"]
  assert names(clips, listed(tmp_path / "l.json", *spellings)) == ["away.mp4", "s/v.mp4"]
  assert names(alias, listed(tmp_path / "l.json", str(clips / "s" / "v.mp4"))) == ["s/v.mp4"]


@pytest.mark.parametrize("name", ["../out.mp4", "/etc/passwd", "s/../../out.mp4", "{clips}x/v.mp4"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_list_that_leads_out_of_the_folder_is_refused(tmp_path, name, suffix):
  clips = tmp_path / "CLIPS"
  clips.mkdir()
  name = name.format(clips=clips)
  path = tmp_path / f"l{suffix}"
  entry = {"video": name, "caption": "c"}
  text = {
    ".json": json.dumps([entry]),
    ".jsonl": json.dumps(entry),
    ".csv": f"video,caption\n{name},c",
  }
  path.write_text(text[suffix])
  with pytest.raises(InputError) as error:
    names(clips, path)
  assert f"leads out of {clips}; accepted: a path inside it" in str(error.value)


@pytest.mark.parametrize("folder", ["media", "media/videos", "media/clips"])
def test_nothing_is_written_through_a_link_out_of_the_work_directory(tmp_path, frames, folder):
  clips, outside, work = tmp_path / "CLIPS", tmp_path / "outside", tmp_path / "W"
  write_video(clips / "v.mp4", frames[:30])
  outside.mkdir()
  (work / folder).parent.mkdir(parents=True)
  (work / folder).symlink_to(outside)
  with pytest.raises(InputError, match="leads out of the work directory"):
    command.run(config(clips), work)
  assert list(outside.iterdir()) == []
  assert {p.name for p in work.iterdir()} - {LOCK} == {"media"}


def test_every_kind_of_video_is_taken_and_other_files_are_named(tmp_path, caplog):
  clips = tmp_path / "clips"
  clip = Path(__file__).parent / "cases/media/cat.ts"
  for name in ("a.ts", "deep/b.WMV", "c.mxf", "._a.ts", ".hidden/d.ts"):
    (clips / name).parent.mkdir(parents=True, exist_ok=True)
    (clips / name).write_bytes(clip.read_bytes())
  (clips / "notes.txt").write_text("x")
  (clips / "song.mp3").write_text("x")
  (clips / "README").write_text("x")
  (clips / "._0.jpg").write_text("x")
  assert names(clips) == ["a.ts", "c.mxf", "deep/b.WMV"]
  (warning,) = caplog.messages
  assert "left out 3 files that are no videos" in warning
  assert all(kind in warning for kind in ("1 of .txt", "1 of .mp3", "1 of no ending"))
  caplog.clear()
  work = tmp_path / "W"
  write_frames(clips / "frames", np.zeros((2, 8, 8, 3), np.uint8))
  assert {p.name for p in benchmark_videos([str(clips)], work)} == {
    "a.ts", "c.mxf", "b.WMV", "frames",
  }  # fmt: skip
  assert benchmark_videos([str(clips / "song.mp3")], work) == [clips / "song.mp3"]  # named itself


def test_a_name_that_is_not_utf8_ends_no_run(tmp_path, frames):
  clips, work = tmp_path / "CLIPS", tmp_path / "W"
  write_video(clips / "v.mp4", frames[:30])
  os.rename(clips / "v.mp4", os.fsencode(clips) + b"/caf\xe9.mp4")
  write_video(clips / "w.mp4", frames[:30][:, ::-1])
  summary = command.run(config(clips), work)
  assert summary["stages"][0]["inputs"] == 2
  kept = {row["source"]: row["video"] for row in Store(work).rows("05_shots")}
  assert "w.mp4" in kept
  for name, video in kept.items():
    assert name in ("w.mp4", r"caf\udce9.mp4")
    assert (work / "media" / video).exists()


def test_a_trial_does_not_decide_the_plan_of_the_full_run(tmp_path, monkeypatch):
  clips = tmp_path / "CLIPS"
  clips.mkdir()
  for i in range(5):
    (clips / f"{i}.mp4").touch()
  monkeypatch.setattr(command, "VIDEOS_A_SHARD", 2)
  c = config(clips).unlock()
  c.shards, c.input.limit = 0, 1
  store, _ = command.open_store(check_settings(c.lock(), tmp_path / "W"), tmp_path / "W")
  assert store.shards == 3


class AnyModel:
  """A backend with a model of the Hub."""

  hub_models = ("checkpoint",)

  def __init__(self, context, checkpoint: str):
    pass

  @staticmethod
  def identity(options, context):
    return {"backend": f"any {options['checkpoint']}", "version": model_version(*options.values())}


def test_a_run_keeps_the_commit_of_a_hubs_model_that_it_began_with(tmp_path, monkeypatch):
  commits = {"lab/m": "a" * 40}
  monkeypatch.setattr(
    hub,
    "pin",
    lambda name: hub.Pinned(f"{name}@{commits[name]}", "mit") if name in commits else None,
  )

  def opened(model: str, workdir: str = "W"):
    c = config(tmp_path).unlock()
    c.roles.analyzer = {"kind": "python", "target": f"{__name__}:AnyModel", "checkpoint": model}
    settings = check_settings(c.lock(), tmp_path / workdir)
    store, settings = command.open_store(settings, tmp_path / workdir)
    return store, settings["roles"]["analyzer"]["checkpoint"], settings

  first = f"lab/m@{'a' * 40}"
  store, name, settings = opened("lab/m")
  assert name == first
  (stage,) = [s for s in make_graph(settings).stages if s.name == "10_analyze"]
  assert stage.agent["backend"] == f"any {first}"
  assert store.settings()["licences"] == {first: "mit"}
  (model,) = licences.models_of_run(store.settings()["config"])
  assert (model["version"], model["price"]) == ("a" * 40, "runs here")
  assert licences.of_run(settings, store.settings()["licences"])[first] == "mit"
  commits["lab/m"] = "b" * 40  # the branch moves on
  assert opened("lab/m")[1] == opened(first)[1] == first
  assert store.settings()["licences"] == {first: "mit"}
  assert opened("lab/m", "other")[1] == f"lab/m@{'b' * 40}"
  store, name, _ = opened("lab/gone", "third")  # no such model, or no network
  assert name == "lab/gone"
  (model,) = licences.models_of_run(store.settings()["config"])
  assert model["version"] == "unknown"
