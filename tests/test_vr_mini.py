"""The packaged vr-mini: answers at once, through Python and the command line alike."""

import numpy as np
import pytest

import vr_jax
from data_pipes.embedded.make_set import TEST_SEED
from data_pipes.embedded.render import render, write_video
from data_pipes.embedded.scenes import COLOUR_NAMES, make_scene
from data_pipes.prompts import bench_q_prompt
from vr_jax import cli
from vr_jax.assets import VR_MINI

SCENES = 6


@pytest.fixture(scope="module")
def model():
  return vr_jax.load()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Held-out videos, a thing of each whose colour stays, and a box around it on a frame."""
  folder, made = tmp_path_factory.mktemp("clips"), []
  for seed in range(TEST_SEED, TEST_SEED + 40):
    scene = make_scene(seed)
    frames, masks = render(scene)
    steady = [i for i, t in enumerate(scene.things) if not (t.change or "").startswith("turns")]
    if not steady:
      continue
    i = steady[0]
    frame = int(masks[i].sum((1, 2)).argmax())
    y, x = np.nonzero(masks[i, frame])
    box = tuple(int(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1))
    path = folder / f"{seed}.mp4"
    write_video(path, frames)
    made.append((path, scene.things[i], vr_jax.Region(box=box, frame=frame)))
    if len(made) == SCENES:
      break
  return made


def colour_question(colour: str) -> str:
  wrong = [c for c in COLOUR_NAMES if c != colour][:3]
  options = [f"({letter}) {c}" for letter, c in zip("ABCD", [*wrong, colour], strict=True)]
  return bench_q_prompt("What colour is <object0><region>?", options)


def test_it_sees_colours(model, clips):
  requests = [vr_jax.Request(v, colour_question(t.colour), [r]) for v, t, r in clips]
  answers = model.ask_many(requests, max_new_tokens=12)
  right = [t.colour in a.text for (_, t, _), a in zip(clips, answers, strict=True)]
  assert sum(right) >= SCENES - 1, [a.text for a in answers]


def test_the_command_and_python_give_the_same_text(model, clips, capsys):
  video, thing, region = clips[0]
  box = ",".join(map(str, region.box))
  command = ["ask", "--video", str(video), "--region", f"box:{box}@{region.frame}"]
  question = "What colour is <region>?"
  assert cli.main([*command, "--question", question, "--max-new-tokens", "16"]) == 0
  printed = capsys.readouterr()
  answer = model.ask(video, question, [region], max_new_tokens=16)
  assert printed.out == answer.text + "\n"
  assert thing.colour in answer.text
  assert "demonstration model" in printed.err
  assert any("demonstration model" in warning for warning in answer.warnings)


def test_the_weights_are_small_enough_to_ship():
  assert sum(f.stat().st_size for f in VR_MINI.rglob("*") if f.is_file()) <= 8e6
