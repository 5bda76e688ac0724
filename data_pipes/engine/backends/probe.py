"""What the backends of a config can do, and under which licence: two small calls to each endpoint,
and no model is loaded."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipes.drawing import FOR_MODELS, data_uri
from data_pipes.engine import licences
from data_pipes.engine.backends.chat import ChatClient, Unanswered
from data_pipes.engine.calls import Calls, ledger
from data_pipes.engine.graph import StopRun
from data_pipes.engine.roles import Context, identity, make_backend

_SEES = ("annotator", "describer")  # roles that show pictures, whatever the input
_SIDE = 64  # of the probe's picture, pixels


@dataclass(frozen=True)
class Probed:
  """One backend: its roles, what was found out, and whether it can be used as configured."""

  roles: tuple[str, ...]
  backend: str
  usable: bool
  found: Mapping[str, str]


def probe(roles: Mapping[str, Mapping[str, Any]]) -> list[Probed]:
  """Asks each endpoint once for all its roles, given as {role: options}.

  Raises:
    InputError: a key's environment variable is empty.
  """
  alike: dict[tuple[str, str], list[str]] = {}
  for role, options in roles.items():
    name = options.get("base_url") or identity(role, options, _context(None))["backend"]
    alike.setdefault((name, options.get("model", "")), []).append(role)
  out = []
  for (name, model), members in alike.items():
    options = roles[next((r for r in members if r in _SEES), members[0])]
    if options.get("kind") == "openai":
      out.append(_endpoint(tuple(members), options))
      continue
    known = [options[key] for key in licences.MODEL_OPTIONS if isinstance(options.get(key), str)]
    findings = {f"licence of {model}": licence(model) for model in known}
    out.append(Probed(tuple(members), name, True, findings))
  return out


def _context(calls: Calls | None) -> Context:
  return Context(lambda: calls, "probe")  # type: ignore[arg-type,return-value]


def _endpoint(members: tuple[str, ...], options: Mapping[str, Any]) -> Probed:
  sees = any(role in _SEES for role in members)
  name = f"{options['base_url']} ({options['model']})"
  findings = {
    f"licence of {options['model']}": "unknown here: read the model's and the host's terms"
  }
  with tempfile.TemporaryDirectory() as folder:
    calls = Calls(Path(folder))
    try:
      role = next((r for r in members if r in _SEES), members[0])
      agent = make_backend(role, {**options, "retries": 1}, _context(calls))
      usable = _ask_both(agent.client, agent.frames if sees else 0, findings)
    finally:
      calls.close()
    tokens = sum(entry["input_tokens"] + entry["output_tokens"] for entry in ledger(Path(folder)))
  if usable:
    findings["usage"] = (
      f"{tokens} tokens for this probe" if tokens else "not returned: no cost known"
    )
  return Probed(members, name, usable, findings)


def _ask_both(client: ChatClient, pictures: int, findings: dict[str, str]) -> bool:
  """The schema alone, then with as many pictures as the roles show; fills `found`."""
  try:
    text = _say(client, "Write the word hello, and nothing else.", 0)
    _, wrong = client.read(text, _WORD, "word")
    findings["schema"] = "enforced"
    if wrong:
      findings["schema"] = (
        f"not enforced, it said {text[:40]!r}: answers are checked and asked again"
      )
  except (Unanswered, StopRun) as error:
    findings["fault"] = str(error)
    if "status 400" in str(error) and client.endpoint.schema:
      findings["fault"] += "; if it refuses response_format, set schema=False"
    return False
  if not pictures:
    return True
  try:
    text = _say(client, "Which colour is this picture? Answer with `word`.", pictures)
  except (Unanswered, StopRun) as error:
    findings["fault"] = f"{pictures} pictures: {error}"
    return False
  seen = "red" in text.lower()
  findings["pictures"] = (
    f"{pictures} taken" if seen else f"{pictures} taken, but said {text[:40]!r}"
  )
  return True


_WORD = {
  "type": "object",
  "properties": {"word": {"type": "string"}},
  "required": ["word"],
  "additionalProperties": False,
}


def _say(client: ChatClient, words: str, pictures: int) -> str:
  content: list[dict[str, Any]] = [{"type": "text", "text": words}]
  url = data_uri(Image.new("RGB", (_SIDE, _SIDE), (220, 20, 20)), FOR_MODELS)
  content += [{"type": "image_url", "image_url": {"url": url}}] * pictures
  message = {"role": "user", "content": content if pictures else words}
  return client.once([message], _WORD, "word")["text"]


def licence(model: str) -> str:
  """What the folder of a model, or its page on the hub, says of its licence."""
  folder = Path(model)
  if folder.is_dir():
    text = licences.of_folder(folder)
    return text if text != licences.UNKNOWN else f"{text}: the folder names none"
  try:
    from huggingface_hub import model_info

    page = model_info(model, timeout=10).card_data
    name = page and (page.get("license_name") or page.get("license"))
  except Exception:  # no network, no such page, no package: the answer is the same
    name = None
  return f"{name or 'unknown'}; read https://huggingface.co/{model}"


def lines(probed: list[Probed]) -> list[str]:
  """The findings for people."""
  out = []
  for one in probed:
    out.append(f"{one.backend}: {', '.join(one.roles)}" + ("" if one.usable else ": NOT USABLE"))
    out += [f"  {what}: {finding}" for what, finding in one.found.items()]
  return out
