"""Prompts as versioned files: <role>/<name>@v<number>.md, rendered with Jinja.

What strangers wrote (captions, texts of other models) goes in through `as_data` alone.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import jinja2

_FOLDER = Path(__file__).parent
_ENVIRONMENT = jinja2.Environment(
  undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=False, autoescape=False
)


@cache
def _text(name: str) -> str:
  return (_FOLDER / f"{name}.md").read_text(encoding="utf-8")


def render(name: str, **values) -> str:
  """The prompt `role/name@vN` with its values filled in."""
  return _ENVIRONMENT.from_string(_text(name)).render(**values)


def prompt_hash(name: str) -> str:
  """Hash of the file, for fingerprints and provenance."""
  return hashlib.blake2b(_text(name).encode("utf-8"), digest_size=8).hexdigest()


def as_data(text: str) -> str:
  """Text between markers that it cannot forge: a JSON string with its angle brackets escaped."""
  quoted = json.dumps(text, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")
  return f"<<<DATA\n{quoted}\nDATA>>>"
