"""`vr compile --inference`: what answers questions, compiled for absent hardware."""

import dataclasses
import json

import jax
import pytest
import small_model

from vr_jax.cli import main
from vr_jax.hardware import CHIPS, Target, parse_target, target_devices
from vr_jax.hlo import Program
from vr_jax.inference import ahead_of_time
from vr_jax.inference.ahead_of_time import compile_programs, with_depth
from vr_jax.inference.options import Options
from vr_jax.inference.placement import Placement
from vr_jax.models.variants import VARIANTS, get_variant
from vr_jax.sharding import make_mesh

STEPS = {"encode", "pool", "merge", "prefill", "empty", "open", "extend", "admit", "decode"}


@pytest.fixture
def small(monkeypatch):
  """A small model of an odd vocabulary, for two of the devices here."""
  llm = dataclasses.replace(small_model.CONFIG.llm, vocab_size=101, kv_heads=2)
  cfg = dataclasses.replace(small_model.CONFIG, llm=llm, name="small")
  monkeypatch.setitem(VARIANTS, "small", cfg)
  monkeypatch.setattr(ahead_of_time, "target_devices", lambda target: jax.devices()[:2])
  return cfg


def test_the_programs_of_vr_ask_are_accounted_for(small, capsys):
  arguments = ["--inference", "--model", "small", "--target", "gpu:l4:1x2", "--max-new-tokens=16"]
  assert main(["compile", *arguments, "--batch-size=1", "--json"]) == 0
  report = json.loads(capsys.readouterr().out)
  assert set(report["programs"]) - {"release"} == STEPS
  assert report["mesh"] == {"data": 1, "tensor": 2}
  assert report["needs"] == sum(report["memory"].values())
  assert 0 < report["programs"]["decode"]["arguments"] < report["memory"]["weights"]
  assert report["floors"]["decode"] > 0
  assert report["tokens_per_second"] == pytest.approx(1 / report["floors"]["decode"])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "--config is missing"),
    (["--inference"], "--model NAME or --config"),
    (["--inference", "--model", "small", "--config", "stage3_instruct"], "one of them"),
    (["--inference", "--model", "pixelrefer-7b"], "models of square frames only"),
    (["--inference", "--model", "small", "--mesh", "rows=2"], "accepted: data=N, tensor=N"),
    (["--inference", "--model", "small", "--mesh", "tensor=3"], "3"),
  ],
)
def test_what_is_not_a_model_or_a_mesh_is_one_line(small, arguments, message, capsys):
  assert main(["compile", "--target", "gpu:l4:1x2", *arguments]) == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.count("\n") == 1


def test_what_does_not_fit_exits_with_3(small, monkeypatch, capsys):
  def compiled(*args):
    memory = {"weights": 20 << 30, "rows": 5 << 30}
    program = ahead_of_time.Compiled(1.0, 1, 1, 1)
    sizes = ahead_of_time.Sizes(8, 48, 128, 256)
    return dict.fromkeys(STEPS, program), memory, sizes, ""

  monkeypatch.setattr(ahead_of_time, "compile_programs", compiled)
  arguments = ["--inference", "--model", "small", "--target", "gpu:l4:1x2", "--quick"]
  assert main(["compile", *arguments]) == 3
  out = capsys.readouterr().out
  assert "25.00  in all: does not fit" in out
  assert "1 and 2 decoder layers" in out


@pytest.mark.parametrize("name", ["a100-40", "a100-80", "b200", "l4", "rtx4090"])
def test_cards_are_known_by_target_and_by_what_jax_calls_them(name):
  from types import SimpleNamespace

  from vr_jax.hardware import chip_of

  assert parse_target(f"gpu:{name}:2x8") == Target(CHIPS[name], "2x8")
  kinds = {
    "a100-40": ["NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"],
    "a100-80": ["NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"],
    "b200": ["NVIDIA B200"],
    "l4": ["NVIDIA L4"],
    "rtx4090": ["NVIDIA GeForce RTX 4090"],
  }[name]
  assert [chip_of(SimpleNamespace(device_kind=kind)).name for kind in kinds] == [name] * len(kinds)
  assert chip_of(SimpleNamespace(device_kind="NVIDIA L40S")) is None


@pytest.mark.compile
@pytest.mark.parametrize("name", ["a100-40", "a100-80", "b200", "l4", "rtx4090", "h100"])
def test_the_compiler_knows_the_card(name):
  (device, *_) = target_devices(parse_target(f"gpu:{name}:1x1"))
  sharding = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((512, 512), "bfloat16", sharding=sharding)
  assert jax.jit(lambda x: jax.nn.silu(x @ x)).lower(x).compile().memory_analysis() is not None


@pytest.mark.compile
@pytest.mark.parametrize("axis", ["tensor", "data"])
def test_all_programs_compile_for_a_tpu_mesh(axis):
  """The 7B at its widths, two layers deep: attention kernels, tables of an odd vocabulary."""
  cfg = with_depth(get_variant("videorefer-7b"), 2)
  cfg = dataclasses.replace(cfg, img=dataclasses.replace(cfg.img, depth=3))
  mesh = make_mesh([(axis, 4)], target_devices(parse_target("tpu:v5e:2x2")))
  texts = {"decode": "", "encode": ""}
  programs, _, _, refusal = compile_programs(cfg, Placement(mesh), "bfloat16", Options(), texts)
  assert not refusal
  assert {*STEPS, "release"} == {*programs}
  # No matrix is turned round before the loop, and no table is moved about in a step.
  assert programs["decode"].temporaries < 0.01 * 2**30
  assert "collective-permute" not in Program(texts["decode"]).collectives()
  assert not Program(texts["encode"]).collectives()  # each chip has its own frames
