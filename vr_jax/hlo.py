"""What a compiled program holds, from the text of its optimised HLO: collectives, large buffers.

Every trip of a loop counts: XLA notes `known_trip_count`, but for TPUs, where the bound stands in
the loop's condition (`i < bound`, from 0 by 1, as scans are). Byte counts are those of one device.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_TYPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OPERATION = re.compile(r"([\w\-]+)\(")
_CALLED = re.compile(
  r"(?:to_apply|calls|body|condition|branch_computations|true_computation|false_computation)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)


class Instruction(NamedTuple):
  """One line: its name, result type as text, operation and the text behind it."""

  name: str
  type: str
  operation: str
  rest: str


class Collectives(NamedTuple):
  """Of one kind: how many run in a step, and the bytes they move.

  Bytes are the whole array: what an all-gather gives, what a reduce-scatter or all-to-all takes,
  twice what an all-reduce takes (it is a reduce-scatter and an all-gather).
  """

  count: int
  bytes: int


class Program:
  """A parsed module."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    self._trips = self._trip_counts(text)

  def _trip_counts(self, text: str) -> dict[str, int]:
    """How often each computation runs in a step."""
    current: list[Instruction] = []
    for line in text.splitlines():
      if (begin := _COMPUTATION.match(line)) is not None:
        current = self.computations.setdefault(begin[2], [])
        self.entry = begin[2] if begin[1] else self.entry
      elif (instruction := _parse(line)) is not None:
        current.append(instruction)
    trips: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
      trips[name] += times
      for instruction in self.computations.get(name, []):
        for called in _called(instruction):
          visit(called, times * self._loop_trips(instruction))

    visit(self.entry, 1)
    return trips

  def _loop_trips(self, instruction: Instruction) -> int:
    """Of a loop; 1 of anything else, and of a loop whose bound is not a constant."""
    if instruction.operation != "while":
      return 1
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest):
      return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
    test = {i.name: i for i in self.computations.get(condition[1] if condition else "", [])}
    for compare in test.values():
      if compare.operation == "compare" and "direction=LT" in compare.rest:
        names = re.findall(r"%([\w.\-]+)", compare.rest[: _closing(compare.rest)])
        bounds = [test[n].rest for n in names if n in test and test[n].operation == "constant"]
        if len(bounds) == 1:
          return int(bounds[0].partition(")")[0])
    return 1

  def instructions(self) -> Iterator[tuple[Instruction, int]]:
    """Every instruction that runs, and how often."""
    for name, instructions in self.computations.items():
      for instruction in instructions if self._trips[name] else ():
        yield instruction, self._trips[name]

  def collectives(self) -> dict[str, Collectives]:
    """By kind, in the order of KINDS; kinds that do not occur are left out.

    The TPU compiler overlaps a collective with arithmetic by writing it down in its start, in each
    fusion that it runs beside and in its end: what has the same channel is one.
    """
    sizes = {i.name: _bytes(i.type) for body in self.computations.values() for i in body}
    totals = {kind: [0, 0] for kind in KINDS}
    channels = set()
    for instruction, times in self.instructions():
      kind = instruction.operation.removesuffix("-start")
      channel = re.search(r"channel_id=(\d+)", instruction.rest)
      if kind not in totals or (channel and channel[1] in channels):
        continue
      channels |= {channel[1]} if channel else set()
      operands = instruction.rest[: _closing(instruction.rest)]
      taken = sum(sizes.get(name, 0) for name in re.findall(r"%([\w.\-]+)", operands))
      if kind == "all-gather":
        # A start gives (operands, results).
        whole = _bytes(instruction.type)
        moved = whole - taken if instruction.operation.endswith("-start") else whole
      else:
        moved = 2 * taken if kind == "all-reduce" else taken
      totals[kind][0] += times
      totals[kind][1] += times * moved
    return {kind: Collectives(*pair) for kind, pair in totals.items() if pair[0]}

  def largest(self, *lengths: int) -> tuple[int, str]:
    """(bytes, type) of the largest array with an axis of one of these lengths; (0, "") if none.

    What exists only inside a fusion takes no memory and does not count.
    """
    best = (0, "")
    fused = self._fused()
    for name, instructions in self.computations.items():
      if name in fused or not self._trips[name]:
        continue
      for instruction in instructions:
        for array in _TYPE.finditer(instruction.type):
          if any(int(n) in lengths for n in array[2].split(",") if n):
            best = max(best, (_bytes(array[0]), array[0]))
    return best

  def _fused(self) -> set[str]:
    every = (i for instructions in self.computations.values() for i in instructions)
    return {name for i in every if i.operation == "fusion" for name in _called(i)}


def _parse(line: str) -> Instruction | None:
  name, equals, right = line.strip().removeprefix("ROOT ").partition(" = ")
  if not equals or not name.startswith("%"):
    return None
  end = _closing(right[1:]) + 2 if right.startswith("(") else right.find(" ")
  operation = _OPERATION.match(right[end:].lstrip())
  if operation is None:
    return None
  rest = right[end:].lstrip()[operation.end() :]
  return Instruction(name[1:], right[:end], operation[1], rest)


def _closing(text: str) -> int:
  """Index of the parenthesis that closes one opened just before `text`."""
  depth = 1
  for index, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if not depth:
      return index
  return len(text)


def _called(instruction: Instruction) -> list[str]:
  return [
    name.strip().lstrip("%")
    for names in _CALLED.findall(instruction.rest)
    for name in names.strip("{}").split(",")
  ]


def _bytes(text: str) -> int:
  """Of all arrays in a type, those in host memory (S(5)) left out."""
  total = 0
  for name, dims, layout in _TYPE.findall(text):
    if "S(5)" in layout:
      continue
    bits = re.search(r"\d+", name)
    width = _BITS[name] if name in _BITS else int(bits[0]) if bits else 0
    total += math.prod(int(n) for n in dims.split(",") if n) * width // 8
  return total
