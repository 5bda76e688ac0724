"""Sweeps: what the members are, that they run, fail, stop and go on, and the table."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipes.errors import InputError
from vr_jax import cli, sweep, sweep_table
from vr_jax.configs import load_config
from vr_jax.evaluation.results import Metric, Result, save
from vr_jax.search import draws, grid, log_uniform, uniform
from vr_jax.sweep import adopt, read_sweep, unfinished
from vr_jax.sweep_table import write_table

TESTS = Path(__file__).parent
SWEEP = str(TESTS / "sweep_config.py")
NAMES = ["lr=0.02", "lr=0.02+b1=0.5", "lr=0.005", "lr=0.005+b1=0.5"]


def test_members_have_the_configs_that_were_added():
  members = read_sweep(f"{SWEEP}:epochs=2.0")
  assert [m.name for m in members] == NAMES
  config = load_config(members[3].spec, members[3].overrides)
  assert (config.lr, config.b1, config.total_epochs) == (0.005, 0.5, 2.0)
  seeds = read_sweep(SWEEP, seeds=2)
  assert [m.name for m in seeds[:2]] == ["lr=0.02+seed=42", "lr=0.02+seed=43"]
  assert [load_config(m.spec, m.overrides).seed for m in seeds[:2]] == [42, 43]


def sweep_file(tmp_path, body):
  path = tmp_path / "s.py"
  config = (
    "from vr_jax.configs import base_config\ndef get_config(arg=None): return base_config()\n"
  )
  path.write_text(config + body)
  return str(path)


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("", r"s\.py: the file defines no sweep"),
    ("def sweep(add): pass", "added nothing"),
    ("def sweep(add):\n  add(lr=1.0)\n  add(lr=1.0)", "added lr=1.0 twice"),
    ("def sweep(add):\n  add(lr=1.0)\n  add(1.0)", r"s\.py:5: TypeError: .* positional argument"),
    ("def metrics(): return {}[1]\ndef sweep(add): add(lr=1.0)", r"s\.py:3: KeyError: 1"),
    ("def sweep(add): add(lrr=1.0)", r"config.lrr is not known; did you mean 'lr'"),
    ("def sweep(add): add(lr='x')", "config.lr='x': expected float"),
    (
      "def sweep(add):\n  add(lr=1.0)\n  add(log_steps=0)",
      "config.log_steps=0: accepted: at least 1",
    ),
    (
      "def sweep(add): add(lr=1.0)\ndef metrics(): return {'m': ('bench-z',)}",
      "bench-z",
    ),
  ],
)
def test_a_sweep_that_does_not_fit(tmp_path, body, message):
  with pytest.raises(InputError, match=message):
    read_sweep(sweep_file(tmp_path, body))


def test_long_names_are_cut_and_stay_apart_and_the_table_has_all_that_was_added(tmp_path):
  files = "tuple(f'/data/annotations/{s}_part{n}.json' for s in ('captions', 'reasoning') * 4)"
  body = f"def sweep(add):\n  for n in (1, 2): add(**{{'input.files': {files}}}, lr=1e-3)"
  members = read_sweep(sweep_file(tmp_path, body))
  names = [member.name for member in members]
  assert len(set(names)) == 2
  for name in names:
    (tmp_path / "W" / name / "multi").mkdir(parents=True)
    assert len(name) <= 60
  table, page, _ = write_table(members, tmp_path / "W")
  for n in (1, 2):
    assert f"/data/annotations/reasoning_part{n}.json" in table.read_text()
    assert f"/data/annotations/reasoning_part{n}.json" in page.read_text()


def test_names_that_look_alike_stay_apart(tmp_path):
  body = "def sweep(add):\n  add(tokenizer='a/b')\n  add(tokenizer='a b')\n  add(tokenizer='A/B')"
  names = [member.name for member in read_sweep(sweep_file(tmp_path, body))]
  assert names[0] == "tokenizer=a_b"
  assert len({name.lower() for name in names}) == 3


def test_none_unsets_a_field_and_numbers_of_numpy_are_numbers(tmp_path):
  body = (
    "import numpy as np\n"
    "def sweep(add):\n"
    "  add(total_steps=3)\n"
    "  add(total_steps=None, total_epochs=np.float32(0.5), profile_steps=(np.int64(1), 2))"
  )
  whole = body.replace("import numpy", "_base = base_config\ndef base_config():\n"
    "  config = _base()\n  config.total_steps = 5\n  return config\nimport numpy")  # fmt: skip
  path = sweep_file(tmp_path, whole)
  configs = [load_config(m.spec, m.overrides) for m in read_sweep(path)]
  assert [c.total_steps for c in configs] == [3, None]
  assert configs[1].total_epochs == 0.5
  assert configs[1].profile_steps == (1, 2)


def test_print_gives_commands_that_the_parser_takes(tmp_path, capsys):
  spec = "ablations:table=7,data=my set"
  assert cli.main(["sweep", spec, "--workdir", str(tmp_path / "W"), "--via", "print"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line for line in lines if line[0] == "#"] == ["# tokens=8", "# tokens=4", "# tokens=1"]
  words = [shlex.split(line) for line in lines if line[0] != "#"]
  assert [w[1] for w in words] == ["train", "eval", "score", "eval", "score"] * 3
  for line in words:
    cli.parse(line[1:])
  assert not (tmp_path / "W").exists()


@pytest.mark.parametrize(
  ("table", "recipe", "count"),
  [(5, "mini_stages", 1), (6, "mini_stages", 4), (7, "mini_stages", 3), (7, "stage3_instruct", 5)],
)
def test_the_ablations_resolve(table, recipe, count):
  members = read_sweep(f"ablations:table={table},recipe={recipe},data=D")
  assert len(members) == count
  first = load_config(members[0].spec, members[0].overrides)
  assert dict(first.model)["region.tokens"] == (max(8, 32 * (count == 5)) if table == 7 else 4)
  if table == 6:
    files = [load_config(m.spec).input.files for m in members]
    assert [len(names) for names in files] == [1, 2, 3, 4]
    assert files[0] == ("D/scene_captions.json",)


def result(value):
  of = {"n": 100, "unit": "share"}
  metrics = [Metric("accuracy", "All", value, ci_low=value - 0.1, ci_high=value + 0.1, **of)]
  metrics = [Metric(**{**vars(m), "ci_method": "wilson"}) for m in metrics]
  return Result("bench-q", {}, "strict", metrics, {"total": 100}, [])


def test_the_table_has_results_and_reasons(tmp_path):
  members = read_sweep("ablations:table=7")
  for member, value in zip(members[:2], (0.5, 0.625), strict=True):
    home = tmp_path / member.name
    for mode in ("single", "multi"):
      save(result(value), home / mode / "strict")
    (home / "done.json").write_text(json.dumps(member.commands(tmp_path)))
  failed = tmp_path / members[2].name
  failed.mkdir()
  (failed / "failed.json").write_text(json.dumps({"command": [], "code": 2, "line": "no | file"}))
  assert unfinished(members, tmp_path) == members[2:]
  text, page, _ = (path.read_text() for path in write_table(members, tmp_path))
  rows = [line for line in text.splitlines() if line.startswith("| tokens=")]
  assert rows[2] == "| tokens=1 | failed: no / file |  |  |"
  assert rows[3:5] == ["| tokens=8 | 50.0 (40.0 – 60.0) |", "| tokens=4 | 62.5 (52.5 – 72.5) |"]
  assert len(rows) == 7
  assert page.count("62.5") >= 2
  assert "no | file" in page


def vr(*args):
  env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
  env |= {"JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, "-m", "vr_jax", *args],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_sweep_runs_stops_goes_on_and_survives_a_failed_member(tmp_path):
  sweep = ("sweep", f"{SWEEP}:broken", "--workdir", str(tmp_path))
  first = vr(*sweep)
  while not (tmp_path / NAMES[0] / "done.json").exists():
    assert first.poll() is None, first.communicate()
    time.sleep(0.1)
  first.terminate()
  _, told = first.communicate(timeout=120)
  assert first.returncode == 143, told
  assert not (tmp_path / NAMES[2]).exists()

  when = (tmp_path / NAMES[0] / "done.json").stat().st_mtime_ns
  table, told = (second := vr(*sweep, "--jobs", "2")).communicate(timeout=600)
  assert second.returncode == 2, told
  assert (tmp_path / NAMES[0] / "done.json").stat().st_mtime_ns == when
  rows = dict(line[2:].split(" | ", 1) for line in table.splitlines() if line.startswith("| "))
  for name in NAMES:
    assert rows[name].startswith("done | 5 | ")
  assert "input.batch_size=5 is not divisible" in rows["batch_size=5"]
  losses = {name: float(rows[name].split(" | ")[2].strip(" |")) for name in NAMES}
  assert len(set(losses.values())) == 4


def test_slurm_queues_members_once_and_the_table_after_them(tmp_path, monkeypatch):
  for name, script in {
    "squeue": f'echo "W/{NAMES[0]}"',
    "sbatch": f'printf "%s\\n" "$*" >> {tmp_path}/queued; wc -l < {tmp_path}/queued',
  }.items():
    (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / name).chmod(0o755)
  options = ("--via", "slurm", "--slurm=--gres=gpu:1")
  monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
  assert cli.main(["sweep", SWEEP, "--workdir", str(tmp_path / "W"), *options]) == 0
  *members, table = (tmp_path / "queued").read_text().splitlines()
  assert [name in line for name, line in zip(NAMES[1:], members, strict=True)] == [True] * 3
  assert all("--gres=gpu:1" in line for line in members)
  assert "--dependency=afterany:1:2:3" in table
  wrapped = shlex.split(members[0].partition("--wrap=exec vr ")[2])
  assert cli.parse(wrapped).only == NAMES[1]


def stand_in(tmp_path, monkeypatch, **scripts):
  for name, script in scripts.items():
    (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
  ("options", "seconds"),
  [
    ("", 300),
    ("--time=5", 75),
    ("-t 10:00", 150),
    ("--time 2:00:00", 300),
    ("-t 1-0", 300),
    ("--time=0-0:10", 150),
    ("--time=UNLIMITED", 300),
  ],
)
def test_a_member_saves_before_its_time_limit_and_not_at_once(options, seconds):
  members = read_sweep(SWEEP)
  (command, *_) = sweep.slurm_commands(SWEEP, members, Path("W"), options.split(), 1)
  assert f"--signal=B:USR1@{seconds}" in command


@pytest.mark.parametrize("options", ["--nodes=2", "--nodes 2", "-N 4", "-N2"])
def test_several_nodes_for_a_member_are_refused(options):
  with pytest.raises(InputError, match=r"--nodes [24]: a member is one process"):
    sweep.slurm_commands(SWEEP, read_sweep(SWEEP), Path("W"), options.split(), 1)
  sweep.slurm_commands(SWEEP, read_sweep(SWEEP), Path("W"), ["--nodes=1", "--nodelist=a"], 1)


def test_the_table_takes_no_devices():
  words = "-p main --gres=gpu:1 --gpus 8 -G 2 --time=5 --exclusive --gpus-per-node=1 -A me"
  assert sweep._for_the_table(words.split()) == ["-p", "main", "--time=5", "-A", "me"]


@pytest.mark.parametrize(
  ("code", "near", "preempted", "again"),
  [(143, True, "None", True), (143, False, "2026-12-01", True), (143, False, "None", False),
   (0, True, "None", False), (2, True, "2026-12-01", False)],
)  # fmt: skip
def test_a_member_that_slurm_stopped_queues_again(
  tmp_path, monkeypatch, code, near, preempted, again
):
  script = f'echo "$@" >> {tmp_path}/asked; echo "A=1 PreemptTime={preempted} B=2"'
  stand_in(tmp_path, monkeypatch, scontrol=script)
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  sweep.queue_again(code, near)
  asked = tmp_path / "asked"
  assert (asked.exists() and "requeue 7" in asked.read_text()) == again


def seeded(value, rights):
  """A result whose items are right or wrong as given, by video."""
  items = [
    {"id": i, "video": f"v{i // 2}", "type": "", "score": int(right), "gt": "A", "error": None}
    for i, right in enumerate(rights)
  ]
  return dataclasses.replace(result(value), items=items)


def test_seeds_are_one_row_and_members_are_compared_with_a_baseline(tmp_path):
  members = read_sweep("ablations:table=7", seeds=2)
  rights = {"tokens=8": "1111", "tokens=4": "1100"}
  for member in members[:4]:
    home = tmp_path / member.name
    answers = [right == "1" for right in rights[member.group]]
    value = (0.5 if member.group == "tokens=8" else 0.6) + 0.1 * member.name.endswith("43")
    save(seeded(value, answers), home / "single" / "strict")
    (home / "done.json").write_text(json.dumps(member.commands(tmp_path)))
  text, page, tex = (path.read_text() for path in write_table(members, tmp_path))
  assert "| tokens=8 | 2 | 55.0 ± 7.1 |" in text
  assert "| tokens=4 | 2 | 65.0 ± 7.1 |" in text
  assert "### Difference to tokens=8" in text
  (row,) = [line for line in text.splitlines() if line.startswith("| tokens=4 | -50.0 |")]
  assert row.endswith("| 4 |")
  assert "65.0 ± 7.1" in page
  assert r"tokens=4 & 2 & 65.0 $\pm$ 7.1 \\" in tex
  (table, *_) = write_table(members, tmp_path, "tokens=4")
  assert "| tokens=8 | +50.0 |" in table.read_text()
  with pytest.raises(InputError, match="--baseline tokens=5; did you mean"):
    write_table(members, tmp_path, "tokens=5")


def test_a_folder_that_was_named_before_goes_on_under_its_name_of_today(tmp_path):
  members = read_sweep(SWEEP)
  (tmp_path / "lr=0.02,b1=0.5").mkdir()
  adopt(members, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["lr=0.02+b1=0.5"]
  # So named it can be given as what another run starts from.
  init = tmp_path / "lr=0.02+b1=0.5"
  assert load_config(f"ablations:init={init}").model_init == (("", str(init)),)


def test_grids_and_draws():
  assert list(grid({"lr": (1, 2), "b": ("x", "y")})) == [
    {"lr": 1, "b": "x"}, {"lr": 1, "b": "y"}, {"lr": 2, "b": "x"}, {"lr": 2, "b": "y"}
  ]  # fmt: skip
  fields = {"lr": log_uniform(1e-5, 1e-3), "b2": (0.9, 0.99), "wd": uniform(0, 1)}
  many = list(draws(200, fields))
  assert many[:10] == list(draws(10, fields))
  assert many[:10] != list(draws(10, fields, seed=1))
  rates = np.log10([values["lr"] for values in many])
  assert -5 <= rates.min() < -4.8
  assert abs(np.median(rates) + 4) < 0.2
  assert {values["b2"] for values in many} == {0.9, 0.99}


def test_by_the_budget_the_better_half_goes_on(tmp_path, monkeypatch):
  body = (
    "_base = base_config\ndef base_config():\n  config = _base()\n"
    "  config.evals = {'v': {'files': ('f',), 'every': 2}}\n"
    "  config.sweep_budget.metric = 'eval/v/loss'\n"
    "  config.sweep_budget.steps = (2, 4)\n  return config\n"
    "def sweep(add):\n  for lr in (1.0, 2.0, 3.0, 4.0): add(lr=lr)"
  )
  members, runs = read_sweep(sweep_file(tmp_path, body)), []

  def run_member(member, workdir, watch, until):
    runs.append((member.name, until))
    (workdir / member.name).mkdir(parents=True, exist_ok=True)
    loss = abs(float(member.name[3:]) - 2.2)
    line = json.dumps({"step": until or 6, "eval/v/loss": loss, "loss": 1.0})
    (workdir / member.name / "metrics.jsonl").write_text(line + "\n")
    if until is None:
      (workdir / member.name / "done.json").write_text(json.dumps(member.commands(workdir)))
    return 0

  monkeypatch.setattr(sweep, "run_member", run_member)
  W = tmp_path / "W"
  assert sweep.run_budget(members, W, 1, lambda text: None) == [0]
  first = [(f"lr={n}.0", 2) for n in (1, 2, 3, 4)]
  assert runs == [*first, ("lr=2.0", 4), ("lr=3.0", 4), ("lr=2.0", None)]
  assert sweep.run_budget(members, W, 1, lambda text: None) == []  # nothing is left
  assert len(runs) == 7
  states = [sweep_table._state(member, W)[0] for member in members]
  assert states == [
    "dropped after 2 steps",
    "done",
    "dropped after 4 steps",
    "dropped after 2 steps",
  ]
