"""Accelerators by name: what a chip can do, and targets such as `tpu:v5e:8x8` as device lists.

Figures are the vendors' (dense bfloat16); `link_gbs` is what one chip can receive from the others
of its slice while all of them do, all links together.
"""

import dataclasses
import importlib.util
import logging
import math
import os
import re
from collections.abc import Sequence

import jax

from data_pipes.errors import InputError


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA reads of a card: compute capability, streaming multiprocessors, GHz, of each threads
  and bytes of shared memory, of that the most for a block, bytes of the second-level cache.

  CUDA C++ Programming Guide, table of compute capabilities; data sheets."""

  capability: tuple[int, int]
  cores: int
  clock: float
  threads: int
  shared: int
  shared_block: int
  l2: int


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator. `memory_gib` is what a program may use of it; `mfu` what published runs of
  models of this size reach on it (share of `tflops`; where none is known, H100's)."""

  name: str
  kind: str  # "tpu" or "gpu"
  tflops: float
  memory_gib: float
  memory_gbs: float
  link_gbs: float
  mfu: float
  gpu: Gpu | None = None


_AMPERE = Gpu((8, 0), 108, 1.41, 2048, 167936, 166912, 40 << 20)
_ADA = Gpu((8, 9), 58, 2.04, 1536, 102400, 101376, 48 << 20)
_HOPPER = Gpu((9, 0), 132, 1.98, 2048, 233472, 232448, 50 << 20)
_BLACKWELL = Gpu((10, 0), 148, 1.965, 2048, 233472, 232448, 126 << 20)

# A GPU program leaves a tenth of the memory to the driver, NCCL and fragmentation.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v5e", "tpu", 197, 15.75, 819, 180, 0.55),
    Chip("v5p", "tpu", 459, 95.0, 2765, 540, 0.55),
    Chip("v6e", "tpu", 918, 31.25, 1638, 360, 0.43),
    Chip("h100", "gpu", 989, 0.9 * 79.1, 3350, 450, 0.45, _HOPPER),
    Chip("h200", "gpu", 989, 0.9 * 131.3, 4800, 450, 0.50, _HOPPER),
    Chip("b200", "gpu", 2250, 0.9 * 167.6, 8000, 900, 0.45, _BLACKWELL),
    Chip("a100-40", "gpu", 312, 0.9 * 39.4, 1555, 300, 0.50, _AMPERE),
    Chip("a100-80", "gpu", 312, 0.9 * 79.1, 2039, 300, 0.50, _AMPERE),
    # PCIe 4 x 16 in the place of NVLink.
    Chip("l4", "gpu", 121, 0.9 * 22.5, 300, 32, 0.45, _ADA),
    Chip(
      "rtx4090",
      "gpu",
      165,
      0.9 * 23.5,
      1008,
      32,
      0.45,
      dataclasses.replace(_ADA, cores=128, clock=2.52, l2=72 << 20),
    ),
  )
}
# What JAX calls them (`Device.device_kind`), the more particular name first.
_KINDS = {
  r"TPU v5 lite|TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e",
  "NVIDIA H100": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200",
  r"NVIDIA A100.*80GB": "a100-80", "NVIDIA A100": "a100-40",
  r"NVIDIA L4\b": "l4", r"NVIDIA GeForce RTX 4090\b(?! D)": "rtx4090",
}  # fmt: skip
NETWORK_GBS = 50  # of one GPU to other hosts, and of one TPU host to other slices
# Topologies that exist, by number of chips.
TOPOLOGIES = {
  "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
_CORES = {"v5p": 2}  # slice names of v5p count cores: v5p-32 has 16 chips


@dataclasses.dataclass(frozen=True)
class Target:
  """Chips of one kind in `slices` slices; `topology` is `8x8` (TPU) or hosts x GPUs a host."""

  chip: Chip
  topology: str
  slices: int = 1

  @property
  def chips(self) -> int:
    return self.slices * math.prod(map(int, self.topology.split("x")))

  def __str__(self) -> str:
    times = f" x {self.slices} slices" if self.slices > 1 else ""
    return f"{self.chip.kind}:{self.chip.name}:{self.topology}{times}"

  @property
  def gather_gbs(self) -> float:
    """Bytes a second (1e9) that each chip can receive when all gather the same."""
    if self.chip.kind == "tpu":
      return self.chip.link_gbs
    hosts, local = map(int, self.topology.split("x"))
    # Between hosts all GPUs of one share in what each of them needs.
    return self.chip.link_gbs if hosts == 1 else min(self.chip.link_gbs, NETWORK_GBS * local)


def chip_of(device: jax.Device) -> Chip | None:
  """The chip that a device is, None where it is none of CHIPS (a CPU, say)."""
  names = (name for kind, name in _KINDS.items() if re.match(kind, device.device_kind))
  return CHIPS.get(next(names, ""))


def parse_target(text: str, slices: int = 1) -> Target:
  """Reads `tpu:v5e:8x8`, `tpu:v5e-64` (the name of a slice) or `gpu:h100:8x8`.

  Raises:
    InputError: another form, an unknown chip, a topology that does not exist.
  """
  kind, _, rest = text.partition(":")
  name, _, topology = (rest.replace("-", ":") if kind == "tpu" else rest).partition(":")
  if kind not in ("tpu", "gpu") or not topology:
    raise InputError(
      f"target {text!r}: expected tpu:TYPE:AxB[xC] or gpu:TYPE:HOSTSxGPUS, "
      "such as tpu:v5e:8x8, tpu:v5e-64 or gpu:h100:8x8"
    )
  of_kind = [chip for chip in CHIPS if CHIPS[chip].kind == kind]
  if name not in of_kind:
    raise InputError(f"target {text!r}: {kind} type {name!r} is not one of {', '.join(of_kind)}")
  if slices < 1:
    raise InputError(f"--slices {slices}: expected at least 1")
  chip = CHIPS[name]
  if kind == "gpu":
    if not re.fullmatch(r"[1-9]\d*x[1-8]", topology):
      raise InputError(
        f"target {text!r}: expected hosts x GPUs of a host (1 to 8), such as gpu:{name}:8x8"
      )
    if slices > 1:
      raise InputError(f"target {text!r}: slices are of TPUs; give more hosts instead")
    return Target(chip, topology)
  accepted = TOPOLOGIES[name]
  if topology.isdigit():
    by_size = {_chips(t) * _CORES.get(name, 1): t for t in accepted}
    if int(topology) not in by_size:
      names = ", ".join(f"{name}-{size}" for size in by_size)
      raise InputError(f"target {text!r}: there is no such slice; accepted: {names}")
    topology = by_size[int(topology)]
  if topology not in accepted:
    raise InputError(
      f"target {text!r}: there is no topology {topology!r}; accepted: {', '.join(accepted)}"
    )
  return Target(chip, topology, slices)


def target_devices(target: Target) -> Sequence[jax.Device]:
  """Descriptions of the target's devices, to compile for; nothing can run on them.

  Raises:
    InputError: the compiler of that hardware is not installed.
  """
  from jax.experimental import topologies

  module = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda13"}[target.chip.kind]
  if not _installed(module):
    package = {"tpu": "libtpu", "gpu": "jax-cuda13-pjrt"}[target.chip.kind]
    raise InputError(
      f"target {target}: the compiler for it is not installed; pip install {package} "
      "(or vr-jax[compile]); no driver and no device are needed"
    )
  quiet()
  if target.chip.kind == "tpu":
    topology = f"{target.chip.name}:{target.topology}"
    more = {"num_slices": target.slices} if target.slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
  return topologies.get_topology_desc(
    platform="cuda", target_config=_gpu_target(target.chip), topology=f"1x{target.topology}"
  ).devices


def quiet() -> None:
  """Keeps eager work on the CPU and the compilers from looking for their hardware."""
  jax.config.update("jax_platforms", "cpu")
  logging.getLogger("jax_plugins").setLevel(logging.ERROR)  # of a driver that nobody needs here
  os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_STDERR_LOG_LEVEL="3",
    TPU_MIN_LOG_LEVEL="3",
  )


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of the parent
    return False


def _chips(topology: str) -> int:
  return math.prod(map(int, topology.split("x")))


def _gpu_target(chip: Chip) -> str:
  """XLA's GpuTargetConfigProto of a card, the fields that its compiler reads."""
  card = chip.gpu
  assert card is not None
  major, minor = card.capability
  return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {card.threads}
  shared_memory_per_block: 49152  shared_memory_per_core: {card.shared}
  shared_memory_per_block_optin: {card.shared_block}
  core_count: {card.cores}  fpus_per_core: {64 if card.capability == (8, 0) else 128}
  clock_rate_ghz: {card.clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {int(chip.memory_gbs * 1e9)}  l2_cache_size: {card.l2}
  device_memory_size: {int(chip.memory_gib / 0.9 * 2**30)}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10 }}
runtime_version {{ major: 12  minor: 8 }}
device_description_str: "NVIDIA {chip.name.upper()}"
"""
