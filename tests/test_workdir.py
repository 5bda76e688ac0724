"""Work directories that other versions, other machines or accidents have left, and hosts that do
not share one."""

import json
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_task

from data_pipes import content as contents
from data_pipes.content import digest_of_data
from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.checkpoint import export, load_meta, load_params, make_meta
from vr_jax.configs import load_config, to_json
from vr_jax.training import digests, processes, workdir
from vr_jax.training.loop import train
from vr_jax.training.metrics import read_metrics
from vr_jax.training.processes import agree_on_data, together
from vr_jax.training.task import PLAN
from vr_jax.training.workdir import check_data, check_same_run, check_shared, read_before

pytestmark = pytest.mark.usefixtures("programs_on_disk")
CONFIG = str(Path(__file__).parent / "toy_config.py")


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
  """A run that was stopped after step 5; its folder is to be copied."""
  folder = tmp_path_factory.mktemp("half") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TOY_SIGNAL", "SIGTERM:4")
    assert train(load_config(CONFIG), folder).step == 5
  return folder


@pytest.fixture
def run(half_way, tmp_path):
  return shutil.copytree(half_way, tmp_path / "run")


def check(run, overrides=(), **options):
  check_same_run(run, load_config(CONFIG, overrides), read_before(run), **options)


def test_a_field_that_the_stored_config_lacks_is_its_default_and_one_that_is_gone_is_named(
  run, caplog
):
  stored = json.loads((run / "config.json").read_text())
  del stored["ema_decay"], stored["input"]["max_empty"]
  (run / "config.json").write_text(json.dumps(stored | {"old_field": 3}))
  check(run)
  assert [r.getMessage() for r in caplog.records] == [
    f"{run}: config.old_field=3 is not a field any more; left out"
  ]
  with pytest.raises(InputError, match=r"ema_decay was \(not there\), is 0\.5; use another"):
    check(run, ["ema_decay=0.5"])


@pytest.mark.parametrize("content", [b"", b'{"lr": 0.', b"\xff\xfe", b"[]", None])
def test_a_config_that_cannot_be_read_is_that_of_the_checkpoint(run, content):
  file = run / "config.json"
  file.unlink() if content is None else file.write_bytes(content)
  check(run)
  with pytest.raises(InputError, match=r"lr was 0\.01, is 0\.5"):
    check(run, ["lr=0.5"])


def test_a_longer_run_is_asked_for_by_name(run):
  with pytest.raises(InputError, match=r"total_epochs was 2\.0, is 4\.0; .* with --extend"):
    check(run, ["total_epochs=4.0"])
  check(run, ["total_epochs=4.0"], extend=True)
  with pytest.raises(InputError, match="lr was"):
    check(run, ["lr=0.5"], extend=True)


def test_a_run_goes_on_without_what_it_began_with(run, monkeypatch):
  meta = {"model": {"name": "m"}, "tokenizer": {"tokenizer.json": "{}"}}
  before = workdir.Before(run / "checkpoints" / "5", meta)
  config = load_config(CONFIG, ["model_init=(('img', '/gone'),)", "tokenizer=/gone/too"])
  going_on = before.going_on(config)
  assert going_on.model_init == (("", str(run / "checkpoints" / "5")),)
  assert going_on.tokenizer is None
  assert workdir.Before().going_on(config) is config
  # Without a tokenizer in the checkpoint, the one that the config names.
  meta["tokenizer"] = {}
  assert before.going_on(config).tokenizer == "/gone/too"

  seen = []
  make = toy_task.make
  monkeypatch.setattr(toy_task, "make", lambda config: seen.append(config) or make(config))
  assert train(load_config(CONFIG), run).finished
  assert seen[0].model_init == (("", str(run / "checkpoints" / "5")),)
  assert load_meta(run)["config"]["model_init"] == []


def test_the_newest_checkpoint_that_can_be_read_counts(tmp_path, caplog):
  for step in (2, 10):
    meta = make_meta({"name": str(step)}, {}, {}, {})
    export(tmp_path / "checkpoints" / str(step), {"a": np.zeros(1)}, meta)
  assert read_before(tmp_path).meta["model"] == {"name": "10"}
  (tmp_path / "checkpoints" / "10" / "meta" / "metadata").write_text("{")
  assert read_before(tmp_path).meta["model"] == {"name": "2"}
  assert "checkpoints/10" in caplog.text


def test_data_are_known_by_their_content_wherever_they_lie(tmp_path):
  for name, content in {"a": b"[1, 2]", "b": b"[1, 2]", "c": b"[1, 3]", "d": b"[1]"}.items():
    (tmp_path / name).write_bytes(content)
  a, b, c, d = (digest_of_data(tmp_path / name) for name in "abcd")
  assert a == b
  assert len({a, c, d}) == 3
  assert a.startswith("6 bytes ")


def test_shards_are_known_by_their_index_and_sizes(tmp_path):
  for name in ("a", "b", "c"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "manifest.json").write_text('{"sha256": 1}')
    (tmp_path / name / "frames-0.array_record").write_bytes(b"abc"[: 2 if name == "c" else 3])
    (tmp_path / name / f"needs-{name}.npy").write_text("a cache")
  a, b, c = (digest_of_data(tmp_path / name) for name in "abc")
  assert a == b != c
  (tmp_path / "b" / "manifest.json").write_text('{"sha256": 2}')
  assert digest_of_data(tmp_path / "b") != a


def test_weights_of_any_size_are_known_by_pieces(tmp_path, monkeypatch):
  monkeypatch.setattr(contents, "WHOLE", 10)
  monkeypatch.setattr(contents, "PIECE", 2)
  (tmp_path / "a").write_bytes(bytes(range(200)))
  (tmp_path / "b").write_bytes(bytes(range(199)) + b"x")
  assert digests.digest_of_weights(tmp_path / "a") != digests.digest_of_weights(tmp_path / "b")
  assert digests.digest_of_weights(tmp_path / "none") == "nothing"
  assert digests.digest_of_weights("vr-mini").endswith(digests.digest_of_weights("vr-mini")[-16:])


def test_weights_that_moved_are_the_same_and_others_are_refused(run, tmp_path):
  for name in ("old", "new", "other"):
    (tmp_path / name).write_text("other" if name == "other" else "weights")
  config = load_config(CONFIG, [f"model_init=(('', '{tmp_path / 'old'}'),)"])
  (run / "config.json").write_text(to_json(config))
  before = read_before(run)
  before = before._replace(meta={**before.meta, "start": workdir.weights_of(config)})
  (tmp_path / "old").unlink()
  check_same_run(run, config, before)
  moved, other = (
    load_config(CONFIG, [f"model_init=(('', '{tmp_path / name}'),)"]) for name in ("new", "other")
  )
  check_same_run(run, moved, before)
  with pytest.raises(InputError, match="model_init was"):
    check_same_run(run, other, before)


def test_other_data_are_refused(tmp_path):
  before = {"input.files[0]": "10 bytes abc"}
  check_data(tmp_path, before, before)
  check_data(tmp_path, {}, before)  # an older version wrote none
  with pytest.raises(InputError, match=r"input\.files\[0\] was 10 bytes abc, is 9 bytes abd; use"):
    check_data(tmp_path, before, {"input.files[0]": "9 bytes abd"})
  with pytest.raises(InputError, match=r"input\.files\[1\] was nothing, is 1 bytes x"):
    check_data(tmp_path, before, {**before, "input.files[1]": "1 bytes x"})
  check_data(tmp_path, before, {**before, PLAN: "3 rows x"})  # an older version wrote no plan
  with pytest.raises(InputError, match=r"plan of the rows was 3 rows x, is 3 rows y; use the same"):
    check_data(tmp_path, {**before, PLAN: "3 rows x"}, {**before, PLAN: "3 rows y"})


@pytest.mark.parametrize(
  "address", ["s3://b/run", "gs:/b", "hf://b/run", "file:///b/run", "az://b"]
)
def test_addresses_that_are_not_paths_are_one_line_and_make_no_folder(
  address, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  assert cli.main(["train", "--config", CONFIG, "--workdir", address]) == 2
  assert capsys.readouterr().err.startswith(f"vr train: --workdir: {address}: accepted: a path")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["log_steps=0", "input.batch_size=0", "mesh=()", "lr=nan"])
def test_a_value_out_of_range_leaves_the_work_directory_alone(name, tmp_path, capsys):
  words = ["train", "--config", CONFIG, "--workdir", str(tmp_path / "W"), f"--config.{name}"]
  assert cli.main(words) == 2
  assert f"config.{name.partition('=')[0]}=" in capsys.readouterr().err
  assert not (tmp_path / "W").exists()


class Processes:
  """Threads in the place of the processes of a run: what each calls, they call together."""

  def __init__(self, count, monkeypatch):
    self.count, self.local = count, threading.local()
    self.barrier, self.texts = threading.Barrier(count), [""] * count
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: self.local.index)
    for module in (processes, workdir):
      monkeypatch.setattr(module, "gather", self.gather)

  def gather(self, text):
    self.texts[self.local.index] = text
    self.barrier.wait(20)
    texts = list(self.texts)
    self.barrier.wait(20)
    return texts

  def call(self, function):
    """What `function(index)` gives or raises, in each process."""
    results = [None] * self.count

    def one(index):
      self.local.index = index
      try:
        results[index] = function(index)
      except InputError as error:
        results[index] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(self.count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return results


def test_hosts_that_do_not_share_the_work_directory_are_told(tmp_path, monkeypatch):
  two = Processes(2, monkeypatch)
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
  assert two.call(lambda i: check_shared(tmp_path / "a", 0.2)) == [None, None]
  first, second = two.call(lambda i: check_shared(tmp_path / "ab"[i], 0.2))
  assert "the work directory is not the same folder on process 1 (" in first
  assert first.partition(": the ")[2] == second.partition(": the ")[2]
  assert not list((tmp_path / "a").iterdir())


def test_what_fails_in_one_process_is_told_in_all(monkeypatch):
  def files(index):
    if index == 1:
      raise InputError("f.json: no such file")
    return "read"

  two = Processes(2, monkeypatch)
  assert two.call(lambda i: together(lambda: i)) == [0, 1]
  first, second = two.call(lambda i: together(lambda: files(i)))
  assert first == second
  assert first.startswith("process 1 (")
  assert first.endswith("): f.json: no such file")


def test_processes_with_other_data_are_told_before_the_first_step(monkeypatch):
  two = Processes(2, monkeypatch)
  assert two.call(lambda i: agree_on_data({"set": "same"})) == [None, None]
  first, second = two.call(lambda i: agree_on_data({"set": f"{i} bytes"}))
  assert first == second
  assert first.startswith("set is 1 bytes on process 1 (")


def test_damaged_files_that_the_run_does_not_need_never_stop_it(run):
  straight = load_params(run)
  lines = (run / "metrics.jsonl").read_bytes()
  (run / "metrics.jsonl").write_bytes(lines + b"\xff\xfe\n[1]\n{}\nnull\n")
  (run / "heartbeat" / "0.json").write_bytes(b"\xff")
  (run / "wandb_id").write_bytes(b"")
  assert train(load_config(CONFIG), run).finished
  assert [line["step"] for line in read_metrics(run)] == list(range(1, 11))
  assert jax.tree.structure(load_params(run)) == jax.tree.structure(straight)
