"""Weights by address, from a hub on the loopback; in processes of their own, since huggingface_hub
reads its environment when it is imported."""

import os
import shutil
import subprocess
import sys

import pytest
from hub_server import COMMIT, serve

from data_pipes.hub import parse_address
from vr_jax.assets import VR_MINI

FETCH = """
import sys
from data_pipes.errors import InputError
from data_pipes.hub import fetch
try:
  folder = fetch(sys.argv[1])
  print(folder.address, *sorted(p.name for p in folder.path.iterdir()))
except InputError as error:
  print(error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  root = tmp_path_factory.mktemp("hub")
  small = root / "lab" / "small"
  small.mkdir(parents=True)
  (small / "config.json").write_text("{}")
  (small / "model.safetensors").write_bytes(bytes(range(64)))
  (small / "modeling.py").write_text("raise SystemExit('code of a repository was run')")
  (small / "optimizer.pt").write_bytes(b"pickle")
  for name in ("gated", "large"):
    shutil.copytree(small, root / "lab" / name)
  (root / "lab" / "large" / "huge.safetensors").write_bytes(b"")
  shutil.copytree(VR_MINI, root / "lab" / "mini")
  (root / "lab" / "pickled").mkdir()
  (root / "lab" / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
  with serve(root) as server:
    server.gated = frozenset({"lab/gated"})
    server.sizes = {"huge.safetensors": 10**18}
    yield server


@pytest.fixture
def environment(hub, tmp_path):
  hub.requests.clear()
  hidden = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
  proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
  return hidden | proxies | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}


def python(code, *arguments, environment, folder):
  command = [sys.executable, "-c", code, *arguments]
  return subprocess.run(
    command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120
  )


def fetch(name, environment, folder):
  done = python(FETCH, name, environment=environment, folder=folder)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_an_address_is_told_from_a_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert parse_address("lab/small") == ("lab/small", None)
  assert parse_address("lab/small@v1.0") == ("lab/small", "v1.0")
  assert parse_address("hf:lab/small@refs/pr/3") == ("lab/small", "refs/pr/3")
  for name in ("vr-mini", "a/b/c", "./lab", "../lab", "/lab/small", "lab/", "lab small/x", "hf:x"):
    assert parse_address(name) is None, name
  (tmp_path / "lab" / "small").mkdir(parents=True)
  assert parse_address("lab/small") is None
  assert parse_address("hf:lab/small") == ("lab/small", None)


def test_it_is_fetched_once_and_then_read_without_a_request(hub, environment, tmp_path):
  expected = f"lab/small@{COMMIT} config.json model.safetensors"
  assert fetch("lab/small", environment, tmp_path) == expected
  assert not any(request.endswith((".py", ".pt")) for request in hub.requests)
  for name, offline in ((f"lab/small@{COMMIT}", {}), ("lab/small", {"HF_HUB_OFFLINE": "1"})):
    hub.requests.clear()
    assert fetch(name, environment | offline, tmp_path) == expected
    assert [request for request in hub.requests if "lab/" in request] == []


@pytest.mark.parametrize(
  ("name", "line"),
  [
    ("lab/absent", "checkpoint 'lab/absent': no such folder, and no such repository on the Hub"),
    ("lab/small@v9", "checkpoint 'lab/small@v9': lab/small has no revision 'v9'"),
    (
      "lab/gated",
      "checkpoint 'lab/gated': gated: accept its terms on the page of lab/gated on the Hub",
    ),
    ("lab/pickled", "checkpoint 'lab/pickled': its weights are pickles (pytorch_model.bin)"),
    ("lab/large", "checkpoint 'lab/large': 1000000000.0 GB to fetch, "),
  ],
)
def test_what_cannot_be_fetched_is_one_line(name, line, hub, environment, tmp_path):
  text = fetch(name, environment, tmp_path)
  assert text.startswith(line)
  assert "\n" not in text
  assert not any(request.startswith("GET") and "resolve" in request for request in hub.requests)


def test_a_hub_that_is_away_is_one_line(environment, tmp_path):
  for away in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
    text = fetch("lab/small", environment | away, tmp_path)
    assert text.startswith("checkpoint 'lab/small': no such folder, and not in the Hub's cache")
    assert "\n" not in text


LOAD = """
import vr_jax
from vr_jax.evaluation.provenance import model_facts
model = vr_jax.load("lab/mini")
facts = model_facts(model, "lab/mini")
print(facts["name"], facts["checkpoint_sha256"] == model_facts(model, None)["checkpoint_sha256"])
"""


def test_a_model_is_loaded_by_its_address_and_recorded_with_its_commit(environment, tmp_path):
  done = python(LOAD, environment=environment, folder=tmp_path)
  assert done.stdout.split() == [f"lab/mini@{COMMIT}", "True"], done.stderr


PIN = """
import sys
from data_pipes.hub import pin
print(*(pin(name) for name in sys.argv[1:]), sep="\\n")
"""


def test_the_commit_of_an_address_is_known_without_its_files(hub, environment, tmp_path):
  def pins(*names, **more):
    done = python(PIN, *names, environment=environment | more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()

  pinned = f"Pinned(address='lab/small@{COMMIT}', licence=None)"
  assert pins("lab/small", "lab/absent", "vr-mini") == [pinned, "None", "None"]
  assert not any("resolve" in request for request in hub.requests)
  assert pins("lab/small", HF_HUB_OFFLINE="1") == ["None"]
  fetch("lab/small", environment, tmp_path)
  assert pins("lab/small", f"lab/x@{COMMIT}", HF_HUB_OFFLINE="1") == [
    pinned,
    f"Pinned(address='lab/x@{COMMIT}', licence=None)",
  ]
