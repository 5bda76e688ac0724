"""Items of a JSON array, or of JSON lines, one after another with their places in the file."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from data_pipes.errors import Defect, InputError

_BLOCK = 4 << 20  # bytes
_SPACE = " \t\n\r"


def read_items(path: str | Path) -> Iterator[Any]:
  """The items of a JSON array one after another, in constant memory.

  Raises:
    InputError: the file is absent, not JSON, no array, or ends early; items before the defect have
      been given out by then.
  """
  for span in scan_items(path):
    if isinstance(span.item, Defect):
      raise span.item
    yield span.item


@dataclass(frozen=True)
class Span:
  """An item and its place in the file: `raw` begins at byte `offset`.

  `item` is what it parses to, or a Defect if its text is not UTF-8.
  """

  offset: int
  raw: bytes
  item: Any


def scan_items(path: str | Path) -> Iterator[Span]:
  """The items of a JSON array with their places, in constant memory.

  Raises:
    InputError: the file is absent, not JSON, no array, or ends early; items before the defect have
      been given out by then.
  """
  for i, (offset, text, item) in enumerate(places(Path(path))):
    raw = text.encode("latin-1")
    # Scanning reads bytes as latin-1: right for ASCII, otherwise the item is parsed again.
    if not text.isascii():
      try:
        item = parse_json(raw, f"{path}: item {i}")
      except Defect as error:
        item = error
    yield Span(offset, raw, item)


def parse_json(raw: bytes, where: str) -> Any:
  try:
    return json.loads(raw)
  except (ValueError, RecursionError) as error:
    raise Defect("utf-8", f"{where}: found {error}; accepted: JSON in UTF-8") from None


def check_text(values: Iterable[Any], where: str) -> None:
  """Raises Defect for text that no UTF-8 can hold: JSON can write half a surrogate pair."""
  for value in values:
    try:
      value.encode() if isinstance(value, str) else None
    except UnicodeEncodeError:
      raise Defect(
        "utf-8", f"{where}: found {value!r}, half a surrogate pair; accepted: JSON in UTF-8"
      ) from None


LINES = (".jsonl", ".ndjson")  # names of files that hold one item after the other, without an array


def places(path: Path) -> Iterator[tuple[int, str, Any]]:
  """Yields (byte offset, raw text, parsed item) of each item of a JSON array or of JSON lines.

  `json.load` would hold the whole file, up to 5.6 GB. So each item is parsed by itself, out of a
  window of a few megabytes that moves over the file (`_Window`).
  """
  if not path.is_file():
    raise InputError(f"{path}: found no such file; accepted: a JSON array of items")
  # Latin-1 makes every byte one character: places in the text are places in the file, and a window
  # may end anywhere, even inside a character of UTF-8 (`scan_items` decodes those anew).
  with open(path, encoding="latin-1", newline="") as file:
    window = _Window(path, file)
    if window.skip_space() == "\xef":
      window.drop_byte_order_mark()
    first = window.skip_space()
    if first != "[" and path.suffix.lower() in LINES:
      while following := window.skip_space():
        if following != "{":
          raise window.fault(f"found {following!r}; accepted: an object a line")
        yield window.parse_item()
      return
    if first != "[":
      raise window.fault(f"found {first!r}" if first else "found nothing")
    window.step()
    if window.skip_space() == "]":
      window.step()
    else:
      following = ","
      while following == ",":
        if not window.skip_space():
          raise window.fault("the file ends inside the array (truncated?)")
        yield window.parse_item()
        following = window.skip_space()
        if following not in (",", "]"):
          raise window.fault(
            f"found {following!r}" if following else "the file ends inside the array (truncated?)"
          )
        window.step()
    if rest := window.skip_space():
      raise window.fault(f"found {rest!r} after the array")


class _Window:
  """The part of a file that is held while its items are parsed one after another.

      [{"id": 1}, {"id": 2}, {"id": 3, "conversations": ...}, ...]
      |           |<-------------- text -------------->|
      byte 0      base       at                        not read yet

  `text[:at]` is done with, and let go when more is read. An item that the window's end cuts is
  tried again after each further block: only the end of the file tells a cut item from a bad one.
  """

  def __init__(self, path: Path, file: TextIO):
    self._path, self._file = path, file
    self._text, self._base, self._at = "", 0, 0
    self._ended, self._items = False, 0
    self._decode = json.JSONDecoder().raw_decode

  def step(self) -> None:
    """Goes past one character."""
    self._at += 1

  def drop_byte_order_mark(self) -> None:
    mark = "\xef\xbb\xbf"  # of UTF-8
    if self._text.startswith(mark):
      self._text, self._base = self._text.removeprefix(mark), len(mark)

  def skip_space(self) -> str:
    """Goes to the next character that is no white space; returns it, "" at the end of the file."""
    while True:
      while self._at < len(self._text) and self._text[self._at] in _SPACE:
        self._at += 1
      if self._at < len(self._text) or self._ended:
        return self._text[self._at : self._at + 1]
      self._read_on()

  def parse_item(self) -> tuple[int, str, Any]:
    """Goes past one item: (byte offset, raw text, parsed item). Raises InputError."""
    while True:
      try:
        item, end = self._decode(self._text, self._at)
      except json.JSONDecodeError as error:
        if self._ended or not self._may_be_cut(error):
          raise self._item_fault(error) from None
      except RecursionError:
        raise self.fault("lists or objects are nested too deep") from None
      except ValueError as error:  # a number of thousands of digits
        raise self.fault(str(error).partition(":")[0]) from None
      else:
        # A number that ends with the window may go on behind it.
        if end < len(self._text) or self._ended:
          break
      self._read_on()
    offset, raw = self._base + self._at, self._text[self._at : end]
    self._at, self._items = end, self._items + 1
    return offset, raw, item

  def fault(self, fault: str) -> InputError:
    """The error for what stands here."""
    place = f"at byte {self._base + self._at}, after {self._items} items"
    accepted = "accepted: one JSON array of items, [{...}, ...]"
    return InputError(f"{self._path}: {place}: {fault}; {accepted}")

  def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
    """Whether an item may be whole once more is read.

    An error well before the window's end is a real one: what is cut (a number, a word, an escape)
    is shorter than 16 characters. Only a string is reported at its opening, however far back.
    """
    return error.pos >= len(self._text) - 16 or "Unterminated" in error.msg

  def _item_fault(self, error: json.JSONDecodeError) -> InputError:
    rest = self._text[error.pos :].strip()
    cut = any(word.startswith(rest) for word in ("true", "false", "null"))
    self._at = error.pos
    if cut or "Unterminated" in error.msg:
      return self.fault("the file ends inside an item (truncated?)")
    return self.fault(error.msg)

  def _read_on(self) -> None:
    # As much again as is held: a long item is tried log2(length) times, in linear time all told.
    block = self._file.read(max(_BLOCK, len(self._text) - self._at))
    self._base, self._text, self._at = (
      self._base + self._at,
      self._text[self._at :] + block,
      0,
    )
    self._ended = not block
