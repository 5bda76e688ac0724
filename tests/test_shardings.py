"""Where every parameter of the full-size models lies on a mesh, against golden files.

`UPDATE_GOLDEN=1 pytest tests/test_shardings.py` writes them anew.
"""

import json
import os
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from vr_jax.cli import main
from vr_jax.configs import load_config
from vr_jax.models.variants import VARIANTS, get_variant
from vr_jax.models.videorefer import init_params
from vr_jax.params import param_shardings, path_names
from vr_jax.sharding import FSDP_STRATEGY, TENSOR_STRATEGY
from vr_jax.training.resolve import shapes, spec_text

GOLDEN = Path(__file__).parent / "golden_shardings"
FULL = [name for name in VARIANTS if name != "vr-mini"]
MESHES = {
  "data=8 x fsdp=1": FSDP_STRATEGY,
  "data=4 x fsdp=2": FSDP_STRATEGY,
  "data=2 x fsdp=4": FSDP_STRATEGY,
  "data=2 x fsdp=2 x tensor=2": TENSOR_STRATEGY,
  "data=1 x fsdp=64": FSDP_STRATEGY,
  "data=1 x fsdp=64 x tensor=4": TENSOR_STRATEGY,
}


def specs(params, mesh: str, strategy) -> dict[str, str]:
  axes = [axis.split("=") for axis in mesh.split(" x ")]
  names, sizes = zip(*axes, strict=True)
  abstract = AbstractMesh(tuple(map(int, sizes)), names, axis_types=(AxisType.Auto,) * len(names))
  placed = param_shardings(params, abstract, strategy)
  paths = jax.tree.leaves(path_names(params))
  return {path: spec_text(s.spec) for path, s in zip(paths, jax.tree.leaves(placed), strict=True)}


@pytest.mark.parametrize("name", FULL)
def test_every_parameter_lies_where_the_golden_file_says(name):
  cfg = get_variant(name)
  params = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  found = {mesh: specs(params, mesh, strategy) for mesh, strategy in MESHES.items()}
  file = GOLDEN / f"{name}.json"
  if os.environ.get("UPDATE_GOLDEN"):
    GOLDEN.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
  assert found == json.loads(file.read_text())


def test_tensor_parallel_layers_meet_in_the_middle():
  """Heads and hidden units over `tensor` out of the first matmul and into the second."""
  golden = json.loads((GOLDEN / "videorefer-7b.json").read_text())
  placed = golden["data=1 x fsdp=64 x tensor=4"]
  assert placed["llm/layers/attn/q_einsum/w"] == "(-, tensor, fsdp, -)"
  assert placed["llm/layers/attn/attn_vec_einsum/w"] == "(-, tensor, -, fsdp)"
  assert placed["llm/layers/mlp/gating_einsum"] == "(-, -, fsdp, tensor)"
  assert placed["llm/layers/mlp/linear"] == "(-, tensor, fsdp)"


def test_one_key_head_stays_whole():
  golden = json.loads((GOLDEN / "videorefer-gemma-2b.json").read_text())
  placed = golden["data=2 x fsdp=2 x tensor=2"]
  assert "tensor" not in placed["llm/layers/attn/kv_einsum/w"]
  assert "tensor" in placed["llm/layers/attn/q_einsum/w"]


def test_the_command_shows_shapes_and_shardings(capsys):
  assert main(["config", "shardings", "stage3_instruct:tensor=2", "--devices", "16"]) == 0
  out = capsys.readouterr().out
  assert "llm/layers/mlp/linear  " in out
  assert "(-, tensor, fsdp)" in out
  assert main(["config", "shapes", "stage2_region"]) == 0
  out = capsys.readouterr().out
  assert "region/fc1/kernel " in out
  assert "float32[1152, 3584] trained" in out
  assert "bfloat16[28, 18944, 3584] frozen" in out


def test_a_mesh_that_the_devices_do_not_fill_is_one_line(capsys):
  assert main(["config", "shardings", "stage3_instruct:tensor=3", "--devices", "16"]) == 2
  assert "fsdp=-1 x tensor=3 does not fit 16 devices" in capsys.readouterr().err


def test_shapes_say_what_trains():
  lines = shapes(load_config("stage1_align"))
  trained = {path.split("/")[0] for path, text in lines.items() if text.endswith("trained")}
  assert trained == {"connector"}
