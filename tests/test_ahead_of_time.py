"""`vr compile`: targets, accounts, refusals; the compilers themselves under marker `compile`."""

import dataclasses
import json

import jax
import pytest
import small_model

from data_pipes.errors import InputError
from vr_jax.cli import main
from vr_jax.configs import load_config
from vr_jax.hardware import CHIPS, Target, parse_target
from vr_jax.hlo import Collectives
from vr_jax.models.variants import VARIANTS
from vr_jax.sharding import make_mesh
from vr_jax.training import ahead_of_time
from vr_jax.training.ahead_of_time import GIB, Measured, Report, make_abstract_step, measure


@pytest.mark.parametrize(
  ("text", "chips"),
  [
    ("tpu:v5e:8x8", 64),
    ("tpu:v5e-64", 64),
    ("tpu:v5p-32", 16),  # counts cores
    ("tpu:v5p:2x2x4", 16),
    ("tpu:v6e-16", 16),
    ("gpu:h100:8x8", 64),
    ("gpu:h200:1x8", 8),
  ],
)
def test_targets_and_names_of_slices(text, chips):
  assert parse_target(text).chips == chips
  if text.startswith("tpu"):
    assert parse_target(text, slices=2).chips == 2 * chips


@pytest.mark.parametrize(
  ("text", "slices", "message"),
  [
    ("v5e:8x8", 1, "expected tpu:TYPE:AxB"),
    ("tpu:v5e", 1, "expected tpu:TYPE:AxB"),
    ("tpu:v7x:2x2", 1, "tpu type 'v7x' is not one of v5e, v5p, v6e"),
    ("tpu:v5e:3x3", 1, "there is no topology '3x3'; accepted: 1x1, 2x2"),
    ("tpu:v5p:8x8", 1, "there is no topology '8x8'; accepted: 2x2x1"),
    ("tpu:v5e-63", 1, "there is no such slice; accepted: v5e-1, v5e-4"),
    ("gpu:h100:8x9", 1, "expected hosts x GPUs of a host"),
    ("gpu:b100:1x8", 1, "gpu type 'b100' is not one of h100, h200, b200, a100-40"),
    ("gpu:h100:8x8", 2, "slices are of TPUs"),
    ("tpu:v5e:8x8", 0, "expected at least 1"),
  ],
)
def test_a_wrong_target_is_one_line(text, slices, message, capsys):
  with pytest.raises(InputError, match=message):
    parse_target(text, slices)
  arguments = ["--config", "stage3_instruct", "--target", text, "--slices", str(slices)]
  assert main(["compile", *arguments]) == 2
  err = capsys.readouterr().err
  assert err.startswith("vr compile: ")
  assert err.count("\n") == 1


def test_a_missing_compiler_names_its_package(monkeypatch):
  from vr_jax import hardware

  monkeypatch.setattr(hardware, "_installed", lambda module: False)
  with pytest.raises(InputError, match="pip install libtpu"):
    hardware.target_devices(parse_target("tpu:v5e:2x2"))


@pytest.fixture
def small_config(monkeypatch):
  """Stage 3 with a small model, for the eight devices here."""
  cfg = dataclasses.replace(
    small_model.CONFIG, connector=dataclasses.replace(small_model.CONFIG.connector, kind="linear")
  )
  monkeypatch.setitem(VARIANTS, "small", cfg)
  monkeypatch.setattr(ahead_of_time, "LENGTHS", 16)
  overrides = ["config.input.max_mask_frames=3", "config.input.batch_size=16"]
  config = load_config("stage3_instruct:model=small,rows=1", overrides)
  return ahead_of_time._set(config, sharding_strategy=((".*", "fsdp('fsdp', 0)"),), loss_chunk=64)


@pytest.mark.slow
def test_the_real_step_is_compiled_and_accounted_for(small_config):
  mesh = make_mesh(small_config.mesh)
  step = make_abstract_step(small_config, mesh)
  assert (step.parts, step.device_rows) == (2, 1)
  assert step.rows["tokens"].shape == (2, 8, 176)
  state = ahead_of_time.state_bytes(step)
  trained = sum(leaf.size for leaf in jax.tree.leaves(step.state.params_train))
  assert state["optimizer moments"] == 2 * state["trained parameters"]
  assert state["trained parameters"] == pytest.approx(4 * trained / 8, rel=0.05)
  assert set(step.state.params_frozen) == {"img"}

  measured = measure(step)
  assert measured.peak > sum(state.values())
  assert measured.collectives["all-gather"].bytes > 0
  assert "all-to-all" not in measured.collectives
  executed, needed = ahead_of_time.executed_flops(step), ahead_of_time.needed_flops(step)
  assert executed > needed > 0


def a_report(peak=8 * GIB, needs=None, **fields):
  target = Target(CHIPS["v5e"], "8x8")
  collectives = {} if peak is None else {"all-gather": Collectives(100, 40 * GIB)}
  values = {
    "config": "stage3_instruct",
    "target": target,
    "mesh": {"data": 1, "fsdp": 64},
    "batch": 128,
    "device_rows": 2,
    "parts": 1,
    "row": {"length": 1536, "frames": 48, "objects": 1, "object_frames": 32},
    "remat": "dots",
    "quick": False,
    "state": {"trained parameters": GIB},
    "measured": Measured(peak, collectives, (GIB // 4, "f32[2,1535,16384]"), needs),
    "executed": 13 * 10**15,
    "needed": 10**16,
    "parameters": 8 * 10**9,
    "suggestion": "none",
  }
  return Report(**{**values, **fields})


def test_the_report_has_floors_and_a_ceiling():
  report = a_report()
  floors = report.floors()
  assert floors["compute"] == pytest.approx(13e15 / 64 / 197e12)
  assert floors["collectives"] == pytest.approx(40 * GIB / 180e9)
  text = str(report)
  for part in ("peak: fits", "x 1.30", "MFU at most 77 %", "40.00  all-gather, 100", "suggestion"):
    assert part in text
  assert json.loads(json.dumps(report.to_dict()))["fits"] is True


@pytest.mark.parametrize(
  ("peak", "needs", "words"),
  [(16 * GIB, None, "peak: does not fit"), (None, 31.45, "the program needs 31.45 GiB")],
)
def test_what_does_not_fit_exits_with_3(peak, needs, words, monkeypatch, capsys):
  monkeypatch.setattr(ahead_of_time, "report", lambda *args, **kw: a_report(peak, needs))
  assert main(["compile", "--config", "stage3_instruct", "--target", "tpu:v5e:8x8"]) == 3
  assert words in capsys.readouterr().out


def test_a_batch_that_does_not_spread_names_one_that_does(small_config):
  config = ahead_of_time._set(small_config, input={**small_config.input, "batch_size": 12})
  with pytest.raises(InputError, match=r"batch_size=12 is not divisible .* use 16"):
    make_abstract_step(config, make_mesh(config.mesh))


@pytest.mark.compile
@pytest.mark.parametrize("target", ["tpu:v5e:2x4", "gpu:h100:1x8"])
def test_the_compilers_take_the_step(small_config, target):
  report = ahead_of_time.report("small", small_config, parse_target(target))
  assert report.fits
  assert report.collective_bytes > 0


@pytest.mark.compile
def test_layers_extrapolate(small_config):
  deep = ahead_of_time.with_depth(small_config, 6)
  target = parse_target("gpu:h100:1x8")
  quick = ahead_of_time.report("small", deep, target, quick=True).measured
  whole = ahead_of_time.report("small", deep, target).measured
  assert quick.peak == pytest.approx(whole.peak, rel=0.15)
  gathered = whole.collectives["all-gather"].bytes
  assert quick.collectives["all-gather"].bytes == pytest.approx(gathered, rel=0.15)
