"""Weights by address: OWNER/NAME[@REVISION] of the Hugging Face Hub.

huggingface_hub fetches and keeps them; its own variables hold here (HF_HOME, HF_HUB_CACHE,
HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT). Files of code are never fetched,
nor are pickles, which can run code when they are read.
"""

import errno
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipes.errors import InputError

if TYPE_CHECKING:
  from huggingface_hub import DryRunFileInfo

PREFIX = "hf:"
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5")
_WEIGHTS = (".safetensors", ".npz", ".ocdbt")
_NOT_FETCHED = (
  *PICKLES,
  "*.py",
  "*.msgpack",
  "*.onnx",
  "*.gguf",
  "*.png",
  "*.jpg",
  "*.gif",
  "*.mp4",
)


class Pinned(NamedTuple):
  """What an address stands for now: OWNER/NAME@COMMIT, and the licence its page names, if any."""

  address: str
  licence: str | None


class HubFolder(NamedTuple):
  """A folder of the Hub on this machine; `address` is OWNER/NAME@COMMIT, exact for ever."""

  path: Path
  address: str


def parse_address(name: str) -> tuple[str, str | None] | None:
  """(OWNER/NAME, revision) of an address; None for what is a path or no address.

  An existing path always counts as the path; `hf:OWNER/NAME` is an address whatever exists.
  """
  explicit = name.startswith(PREFIX)
  if not explicit and Path(name).exists():
    return None
  match = _ADDRESS.fullmatch(name.removeprefix(PREFIX))
  # ./a and ../a are paths that do not exist.
  if match is None or match["repo"].startswith("."):
    return None
  return match["repo"], match["revision"]


@cache  # of one process: what is loaded and what is written down about it are one commit
def fetch(name: str) -> HubFolder:
  """The folder of an address, fetched where the cache lacks it.

  A cached commit costs no request; a branch costs one, or none where HF_HUB_OFFLINE is set.

  Raises:
    InputError: no address; no such repository or revision; private, gated or pickled weights; the
      Hub is not reached and the cache lacks it; a disk too small for it, before the first byte.
  """
  from huggingface_hub import constants  # half a second that no other command waits for

  parsed = parse_address(name)
  if parsed is None:
    raise InputError(f"{name!r} is no address; accepted: OWNER/NAME[@REVISION], with hf: in front")
  repo, revision = parsed
  chosen = {"ignore_patterns": list(_NOT_FETCHED)}
  if not constants.HF_HUB_OFFLINE:
    files = _snapshot(name, repo, revision, dry_run=True, **chosen)
    if files is not None:
      if not any(file.filename.endswith(_WEIGHTS) for file in files):
        _refuse_pickles(name, _snapshot(name, repo, revision, dry_run=True))
      _refuse_large(name, files, Path(constants.HF_HUB_CACHE))
  folder = Path(_snapshot(name, repo, revision, **chosen))
  return HubFolder(folder, f"{repo}@{folder.name}")


@cache
def pin(name: str) -> Pinned | None:
  """The commit of an address, and nothing fetched; None where neither Hub nor cache knows it."""
  from huggingface_hub import HfApi, constants

  parsed = parse_address(name)
  if parsed is None:
    return None
  repo, revision = parsed
  commit, licence = revision if _COMMIT.fullmatch(revision or "") else None, None
  if not constants.HF_HUB_OFFLINE:
    try:
      page = HfApi(library_name="vr_jax").model_info(repo, revision=revision, timeout=10)
      card: Any = page.card_data or {}
      commit, licence = page.sha, card.get("license_name") or card.get("license")
    except Exception:  # no network, no such page: what is cached may serve
      pass
  if commit is None:
    cached = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    ref = cached / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else None
  return Pinned(f"{repo}@{commit}", licence) if commit else None


def _snapshot(name: str, repo: str, revision: str | None, **options: Any) -> Any:
  """huggingface_hub.snapshot_download; what it raises is one line. A dry run without a Hub: None.

  Raises:
    InputError: as `fetch` says.
  """
  from huggingface_hub import errors, snapshot_download

  try:
    return snapshot_download(repo, revision=revision, library_name="vr_jax", **options)
  except errors.DryRunError as error:
    # The cause tells a refusal from a Hub that is away, in whose place the cache may serve.
    if not isinstance(error.__cause__, errors.HfHubHTTPError):
      return None
    failure: Exception = error.__cause__
  except Exception as error:  # the library and its HTTP client have kinds of their own
    failure = error
  raise InputError(f"checkpoint {name!r}: {_reason(failure, repo, revision)}") from failure


def _reason(error: Exception, repo: str, revision: str | None) -> str:
  """Why nothing was fetched, and what to do."""
  from huggingface_hub import errors

  if isinstance(error, errors.GatedRepoError):
    return f"gated: accept its terms on the page of {repo} on the Hub, then set HF_TOKEN"
  if isinstance(error, errors.RepositoryNotFoundError):
    return "no such folder, and no such repository on the Hub (a private one needs HF_TOKEN)"
  if isinstance(error, errors.RevisionNotFoundError):
    return f"{repo} has no revision {revision!r}"
  if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
    return (
      "no such folder, and not in the Hub's cache; the Hub is not reached or HF_HUB_OFFLINE set"
    )
  if isinstance(error, OSError) and error.errno == errno.ENOSPC:
    return "the disk is full; the same command goes on when there is room"
  text = " ".join(str(error).split())[:200]
  return f"not fetched ({type(error).__name__}: {text}); the same command goes on"


def _refuse_pickles(name: str, files: Sequence["DryRunFileInfo"]) -> None:
  """A repository without other weights than pickles is refused by the name of one."""
  for file in files:
    if any(map(Path(file.filename).match, PICKLES)):
      raise InputError(
        f"checkpoint {name!r}: its weights are pickles ({file.filename}), which can run code when "
        "they are read; accepted: safetensors and checkpoints of vr_jax; a folder of pickles that "
        "you fetched yourself is read by its path"
      )


def _refuse_large(name: str, files: Sequence["DryRunFileInfo"], cache: Path) -> None:
  """What does not fit the disk is refused before its first byte."""
  needed = sum(file.file_size or 0 for file in files if file.will_download)
  free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
  if needed > free:
    raise InputError(
      f"checkpoint {name!r}: {needed / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free in {cache}; "
      "HF_HOME names another place"
    )
