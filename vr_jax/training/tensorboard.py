"""TensorBoard event files with scalars, written without TensorFlow or PyTorch.

A file is a sequence of TFRecords (length, its checksum, data, its checksum), each an `Event`
protocol buffer. Source: tensorflow/core/util/event.proto, tensorflow/core/lib/io/record_writer.h.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path


class EventWriter:
  """Writes one event file in a folder. TensorBoard hides what older files say of later steps."""

  def __init__(self, folder: Path | str, first_step: int = 0):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
    self._file = open(folder / name, "wb")  # noqa: SIM115 (closed by close)
    self._event(0, _field(3, b"brain.Event:2"))
    # SessionLog START at a step: everything from that step on is forgotten.
    self._event(first_step + 1, _field(7, _varint_field(1, 1)))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Adds numbers of one step."""
    value = (
      _field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", number))
      for name, number in values.items()
    )
    self._event(step, _field(5, b"".join(value)))
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _event(self, step: int, what: bytes) -> None:
    data = b"\x09" + struct.pack("<d", time.time()) + _varint_field(2, step) + what
    length = struct.pack("<Q", len(data))
    self._file.write(length + _checksum(length) + data + _checksum(data))


def _varint(number: int) -> bytes:
  out = bytearray()
  while number > 0x7F:
    out.append(number & 0x7F | 0x80)
    number >>= 7
  out.append(number)
  return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
  return _varint(number << 3) + _varint(value)


def _field(number: int, data: bytes) -> bytes:
  return _varint(number << 3 | 2) + _varint(len(data)) + data


def _table() -> list[int]:
  table = []
  for n in range(256):
    for _ in range(8):
      n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    table.append(n)
  return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
  """CRC-32C (Castagnoli)."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
  return crc ^ 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
  crc = crc32c(data)
  return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
