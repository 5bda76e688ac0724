"""The comparing core: what it lets pass, what it fails, and what it says of folders."""

import json

import numpy as np
import pytest

from data_pipes.errors import InputError
from vr_jax.parity import golden
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
    (Produced({"out": X}), "ids is not produced"),
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
