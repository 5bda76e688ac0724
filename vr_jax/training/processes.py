"""The processes of one run: how they find each other, and that they all run the same thing.

    VR_COORDINATOR=HOST:PORT VR_PROCESSES=N VR_PROCESS=I   process I of N; process 0 listens there
    VR_COORDINATOR=auto                                    JAX asks the machine: TPU pod, Slurm, MPI
    a Slurm step of several tasks, several TPU workers     the same, without being told
    none of these                                          one process

Process 0 holds the coordination service. A process that is not heard of for VR_HEARTBEAT_SECONDS
(default 100) ends all of them; the run goes on from its last checkpoint when it is started again.
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socket import gethostname
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from vr_jax.checkpoint import package_versions
from vr_jax.configs import diff, from_json, to_json
from vr_jax.training.task import task_name

T = TypeVar("T")
_PLAIN = ("VR_COORDINATOR", "VR_PROCESSES", "VR_PROCESS")


def join(environ: Mapping[str, str] = os.environ) -> None:
  """Joins the other processes of the run, if there are any; before JAX looks at its devices.

  Raises:
    InputError: settings that say something impossible.
  """
  arguments = coordinator(environ)
  if arguments is None:
    return
  seconds = environ.get("VR_HEARTBEAT_SECONDS", "100")
  if not seconds.isdecimal() or int(seconds) < 1:
    raise InputError(f"VR_HEARTBEAT_SECONDS={seconds!r}: accepted: whole seconds, at least 1")
  if arguments:
    # JAX would complete what is not given, device ids among it, from a scheduler's environment: a
    # process of a Slurm step would get the one GPU of its local number, not all of its node.
    arguments["cluster_detection_method"] = "deactivate"
  jax.distributed.initialize(
    **arguments, heartbeat_timeout_seconds=int(seconds), shutdown_timeout_seconds=60
  )


def check_devices(environ: Mapping[str, str] = os.environ) -> None:
  """Refuses fewer devices than the job holds.

  Raises:
    InputError: a GPU of this node is in the job and not in this process, which is alone on it.
  """
  held = environ.get("SLURM_GPUS_ON_NODE", "")
  here = jax.local_device_count()
  if not held.isdecimal() or not _alone(environ) or jax.devices()[0].platform != "gpu":
    return
  if here < int(held):
    raise InputError(
      f"{gethostname()}: JAX sees {here} of the {held} GPUs that the job holds on this node; "
      "accepted: all (CUDA_VISIBLE_DEVICES, --gpus-per-task)"
    )


def _alone(environ: Mapping[str, str]) -> bool:
  """Whether a Slurm step has one task on each of its nodes."""
  tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
  return tasks == environ.get("SLURM_STEP_NUM_NODES", tasks)


def _slurm_step(environ: Mapping[str, str]) -> dict[str, Any]:
  """A step of one task a node in numbers, so that each drives all GPUs of its node; {}: JAX asks.

  The port is the one that JAX takes.
  """
  names = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_PROCID")
  nodes, job, index = (environ.get(name, "") for name in names)
  first = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
  if not (first and job.isdecimal() and index.isdecimal() and _alone(environ)):
    return {}
  port = int(job) % 2**12 + 2**16 - 2**12
  return {
    "coordinator_address": f"{first[1]}{first[2] or ''}:{port}",
    "num_processes": int(environ["SLURM_STEP_NUM_TASKS"]),
    "process_id": int(index),
  }


def coordinator(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """What the environment says, as arguments of `jax.distributed.initialize`; None: one process.

  Raises:
    InputError: some of the VR_ variables are missing, or out of range.
  """
  address = environ.get("VR_COORDINATOR")
  if address == "auto":
    return _slurm_step(environ) if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" else {}
  if given := [name for name in _PLAIN if environ.get(name)]:
    if len(given) < len(_PLAIN):
      missing = ", ".join(name for name in _PLAIN if name not in given)
      raise InputError(
        f"{', '.join(given)} without {missing}; accepted: all three, or VR_COORDINATOR=auto"
      )
    count, index = environ["VR_PROCESSES"], environ["VR_PROCESS"]
    host, colon, port = environ["VR_COORDINATOR"].rpartition(":")
    if not (host and colon and port.isdecimal()):
      raise InputError(f"VR_COORDINATOR={address!r}: accepted: HOST:PORT, or auto")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
      raise InputError(
        f"VR_PROCESS={index!r} of VR_PROCESSES={count!r}: accepted: 0 to VR_PROCESSES - 1"
      )
    numbers = {"num_processes": int(count), "process_id": int(index)}
    return {"coordinator_address": address, **numbers} if int(count) > 1 else None
  tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")  # of `srun`; a shell in an allocation has none
  if tasks != "1":
    return _slurm_step(environ)
  return {} if len(environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 else None


def agree(config: ConfigDict) -> None:
  """Waits for all processes, and refuses to run where they were not started alike.

  Raises:
    InputError: they have different configs, code or versions; the same line in all of them.
  """
  if jax.process_count() == 1:
    return
  mine = {
    "host": gethostname(),
    "config": json.loads(to_json(config)),
    "code": code_digest(config.task),
    "versions": package_versions(),
  }
  first, *others = (json.loads(text) for text in gather(json.dumps(mine)))
  for index, other in enumerate(others, 1):
    if lines := differences(first, other):
      raise InputError(
        f"process {index} ({other['host']}) does not run what process 0 ({first['host']}) runs: "
        f"{'; '.join(lines)}; start all with the same command and the same installation"
      )


def together(action: Callable[[], T]) -> T:
  """What `action` gives in this process; where it fails in one, all fail with the same line.

  Raises:
    InputError: that of the first process that had one.
  """
  if jax.process_count() == 1:
    return action()
  try:
    result, line = action(), ""
  except InputError as error:
    line = str(error)
  for index, (host, other) in enumerate(map(json.loads, gather(json.dumps([gethostname(), line])))):
    if other:
      raise InputError(f"process {index} ({host}): {other}")
  return result


def agree_on_data(data: Mapping[str, str]) -> None:
  """Refuses processes that do not read the same data.

  Raises:
    InputError: naming the first that differs; the same line in all of them.
  """
  if jax.process_count() == 1:
    return
  texts = gather(json.dumps([gethostname(), dict(data)]))
  (host, first), *others = (json.loads(text) for text in texts)
  for index, (other_host, other) in enumerate(others, 1):
    for name in sorted({*first, *other}):
      here, there = first.get(name, "nothing"), other.get(name, "nothing")
      if here != there:
        raise InputError(
          f"{name} is {there} on process {index} ({other_host}) and {here} on process 0 ({host}); "
          "accepted: the same data on all hosts"
        )


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """In what two processes differ, in words; each as `agree` describes it, the host aside."""
  a, b = (from_json(json.dumps(process["config"])) for process in (first, other))
  lines = [f"config.{key} is {there!r}, not {here!r}" for key, (here, there) in diff(a, b).items()]
  versions = {*first["versions"].items()} ^ {*other["versions"].items()}
  for package in sorted({name for name, _ in versions}):
    here, there = (process["versions"].get(package) for process in (first, other))
    lines.append(f"{package} is {there}, not {here}")
  if first["code"] != other["code"]:
    lines.append("the files of vr_jax, data_pipes or of the task differ")
  return lines


def gather(text: str) -> list[str]:
  """The texts that the processes give, in their order, in each of them."""
  data = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.asarray(len(data), np.int32)).ravel()
  padded = np.zeros(lengths.max(), np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [bytes(row[:n]).decode() for row, n in zip(np.asarray(rows), lengths, strict=True)]


def code_digest(task: str) -> str:
  """A digest of all Python files of this package, of data_pipes and of the module of a task."""
  code = hashlib.blake2b(digest_size=16)
  for package in ("vr_jax", "data_pipes"):
    spec = importlib.util.find_spec(package)
    _digest(code, Path(spec.submodule_search_locations[0]).rglob("*.py"))
  task = task_name(task)
  module = importlib.util.find_spec(task.partition(":")[0]) if ":" in task else None
  if module is not None and module.origin:
    _digest(code, [Path(module.origin)])
  return code.hexdigest()


def _digest(code: Any, files: Sequence[Path]) -> None:
  for file in sorted(files):
    code.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
