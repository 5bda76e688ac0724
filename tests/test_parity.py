"""The comparing core: what it lets pass, what it fails, and what it says of folders."""

import json
import logging
import warnings

import numpy as np
import pytest

from data_pipes.errors import InputError
from vr_jax.cli import main
from vr_jax.parity import forward, golden
from vr_jax.parity.golden import (
  FAIL,
  PASS,
  REFUSED,
  SKIPPED,
  Case,
  Golden,
  Produced,
  Refused,
  Skipped,
  compare,
  compare_cases,
  run_parity,
)

X = np.arange(4, dtype=np.float32)
WANTED = {"in": X, "out": X, "ids": np.array([1, 2], np.int32)}


def make_case(tolerance=None, wanted=WANTED):
  fields = {
    "id": "c",
    "arrays": {name: {"key": f"c/{name}"} for name in wanted},
    "tol": tolerance or {"atol": 0.1, "rms_tol": 0.06},
  }
  case = Case(fields, "s", {f"c/{name}": array for name, array in wanted.items()})
  case["in"]
  return case


def produced(out=X, ids=(1, 2), **kwargs):
  return Produced({"out": out, "ids": np.array(ids)}, **kwargs)


def test_equal_arrays_pass_and_inputs_need_not_be_produced():
  result = compare(make_case(), produced())
  assert (result.status, result.max_error, result.rms_error) == (PASS, 0.0, 0.0)
  assert (result.tolerance, result.rms_tolerance) == (0.1, 0.06)


@pytest.mark.parametrize(
  ("ours", "says"),
  [
    (produced(X + np.float32([0, 0, 0, 0.11])), "out differs by 1.1e-01"),
    (produced(X + np.float32(0.09)), "rms 9.0e-02"),  # within atol everywhere, but not the rms
    (produced(np.float32([0, 1, 2, np.nan])), "out differs by nan"),
    (produced(X[:3]), r"out has shape [3] instead of [4]"),
    (produced(ids=(1, 3)), "ids differs"),
    (Produced({}), "nothing was compared"),
  ],
)
def test_what_fails(ours, says):
  result = compare(make_case(), ours)
  assert result.status == FAIL
  assert says in result.note
  assert "fail" in str(result)


def test_one_value_far_off_is_within_rms_but_not_atol():
  far = np.zeros(400, np.float32)
  far[7] = 0.5
  wanted = {"in": X, "out": np.zeros(400, np.float32), "ids": np.array([1, 2])}
  result = compare(make_case(wanted=wanted), produced(far))
  assert result.status == FAIL
  assert result.rms_error < 0.06


def test_own_tolerances_and_relative_ones():
  case = make_case({"atol": 0.0, "rtol": 0.1})
  assert compare(case, produced(X * np.float32(1.09))).status == PASS
  assert compare(case, produced(X * np.float32(1.11))).status == FAIL
  assert compare(case, produced(X + 1, atol={"out": 1.5})).status == PASS
  assert compare(case, produced(X + 2, atol={"out": 1.5})).status == FAIL


def test_loose_arrays_are_named_but_do_not_fail():
  result = compare(make_case(), produced(X + 1, loose=frozenset({"out"}), note="fragile"))
  assert result.status == PASS
  assert result.max_error == 0
  assert "fragile; out differs by 1.0e+00" in result.note
  assert compare(make_case(), produced(X + 1, (1, 3), loose=frozenset({"out"}))).status == FAIL


def test_an_unknown_array_is_named_and_fails_only_a_case_without_others():
  result = compare(make_case(), Produced({"out": X}))
  assert (result.status, result.unknown) == (PASS, ("ids",))
  assert "not known here, so not compared: ids" in str(result)
  assert compare(make_case(), Produced({"out": X + 1})).status == FAIL
  result = compare(make_case(), Produced({"other": X}))
  assert (result.status, result.unknown) == (FAIL, ("out", "ids"))


@pytest.mark.parametrize(
  ("error", "status"),
  [(Refused("B28"), REFUSED), (Skipped("clip"), SKIPPED), (InputError("no"), FAIL)],
)
def test_cases_that_do_not_run(error, status):
  def run(case):
    raise error

  (result,) = compare_cases([make_case()], run)
  assert (result.status, result.note) == (status, str(error))


def test_our_own_faults_are_not_hidden():
  with pytest.raises(ZeroDivisionError):
    list(compare_cases([make_case()], lambda case: 1 / 0))


@pytest.fixture
def folder(tmp_path):
  np.savez(tmp_path / "a.npz", **{"one/x": X, "one/y": 2 * X})
  arrays = {k: {"key": f"one/{k}"} for k in "xy"}
  case = {"id": "one", "arrays": arrays, "tol": {"atol": 1e-6}}
  index = {"stages": [{"stage": "00_double", "npz": "a.npz", "cases": [case]}], "other_json": {}}
  (tmp_path / "cases.json").write_text(json.dumps(index))
  return tmp_path


def double(golden: Golden):
  return compare_cases(golden.cases("00_double"), lambda case: {"y": case["x"] * 2})


def test_a_registered_stage_runs_and_is_reported(folder, monkeypatch):
  monkeypatch.setitem(golden.STAGES, "00_double", f"{__name__}:double")
  seen = []
  results = run_parity(folder, report=seen.append)
  assert results == seen
  assert [(r.stage, r.case, r.status) for r in results] == [("00_double", "one", PASS)]


def warn_and_double(golden: Golden):
  logging.getLogger("data_pipes.samples").warning("object 0 vanishes in frame 3")
  warnings.warn("donated buffers were not usable", stacklevel=1)
  return double(golden)


def test_no_warning_stands_between_the_rows(folder, monkeypatch, capfd):
  monkeypatch.setitem(golden.STAGES, "00_double", f"{__name__}:warn_and_double")
  assert main(["parity", str(folder)]) == 0
  out, err = capfd.readouterr()
  assert len(out.splitlines()) == 1
  assert not err
  with pytest.warns(UserWarning, match="donated"):  # the filter ends with the command
    warn_and_double(Golden(folder))


def test_a_stage_that_nothing_compares_fails(folder):
  (result,) = run_parity(folder)
  assert result.status == FAIL
  assert "no code compares" in result.note


def test_folders_that_are_no_golden_set(tmp_path, folder):
  with pytest.raises(InputError, match=r"no cases\.json"):
    run_parity(tmp_path / "nowhere")
  with pytest.raises(InputError, match=r"'05_x'; it has 00_double"):
    run_parity(folder, ["05_x"])
  for text in ("not json", "[]", "{}", '{"stages": [1]}'):
    (folder / "cases.json").write_text(text)
    with pytest.raises(InputError, match="no index of golden cases"):
      run_parity(folder)


def test_a_golden_folder_without_its_arrays(folder, monkeypatch):
  monkeypatch.setitem(golden.STAGES, "00_double", f"{__name__}:double")
  (folder / "a.npz").unlink()
  with pytest.raises(InputError, match=r"without a\.npz"):
    run_parity(folder)


@pytest.fixture
def forward_set(golden, tmp_path):
  """A function: case -> its arrays -> the folder of a set that holds them, and those recorded."""
  for name in ("tiny_videorefer_qwen2", "arrays"):
    (tmp_path / name).symlink_to(golden / name)
  index = json.loads((golden / "cases.json").read_text())
  (stage,) = [s for s in index["stages"] if s["stage"] == "05_forward"]
  recorded = dict(np.load(golden / "arrays/05_forward_complete.npz"))

  def write(arrays):
    held = [case for case in stage["cases"] if case["id"] in arrays]
    for case in held:
      case["arrays"] = {name: {"key": f"{case['id']}/{name}"} for name in arrays[case["id"]]}
    changed = {"stages": [stage | {"npz": "set.npz", "cases": held}], "other_json": {}}
    files = {f"{case}/{name}": array for case in arrays for name, array in arrays[case].items()}
    np.savez(tmp_path / "set.npz", **files)
    (tmp_path / "cases.json").write_text(json.dumps(index | changed))
    return tmp_path

  inputs = ("input_ids", "video_u8", "frame_u8", "masks")
  cases = ("i_multi_frame", "i_two_regions")
  return write, {c: {name: recorded[f"{c}/{name}"] for name in (*inputs, "logits")} for c in cases}


def test_a_set_may_hold_the_last_logits_alone(forward_set, capfd):
  write, cases = forward_set
  for arrays in cases.values():
    arrays["logits_last"] = arrays.pop("logits")[:, -1]
  cases["i_two_regions"]["logits_last"] = cases["i_two_regions"]["logits_last"] + 0.01
  assert main(["parity", str(write(cases))]) == 1
  out, err = capfd.readouterr()
  multi_frame, two_regions = out.splitlines()
  assert multi_frame.split()[1:3] == ["i_multi_frame", "pass"]
  assert "not compared" not in out
  assert "logits_last differs by 1.0e-02" in two_regions
  assert not err


def test_arrays_that_nobody_knows(forward_set, capfd):
  write, cases = forward_set
  cases["i_multi_frame"]["hidden_7"] = X
  del cases["i_two_regions"]["logits"]
  assert main(["parity", str(write({"i_multi_frame": cases["i_multi_frame"]}))]) == 0
  assert capfd.readouterr().out.rstrip().endswith("not known here, so not compared: hidden_7")
  cases["i_two_regions"]["router"] = X
  assert main(["parity", str(write(cases))]) == 1
  assert "nothing was compared; not known here, so not compared: router" in capfd.readouterr().out


def test_the_last_logits_are_those_of_each_rows_last_slot():
  logits = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
  valid = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
  last = forward.logits_views(logits, valid)["logits_last"]
  assert last.tolist() == [[3, 4, 5], [21, 22, 23]]
