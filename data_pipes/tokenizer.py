"""Text to ids and back, and chat templates, from the tokenizer files of a checkpoint."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data_pipes.errors import InputError

REGION = "<region>"
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
)

# Qwen2's split of text into words, needed when a folder holds vocab.json + merges.txt only.
_QWEN2_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
  """A tokenizer with its special ids and chat template; `<region>` is always one id.

  Attributes:
    region_id: id of `<region>`, added as the next free id where the files lack it (as upstream).
    eos_id, pad_id, bos_id: ids, or None where the tokenizer files name none. What ends a
      generation is the business of generation_config.json, not of this class.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    special_tokens: Mapping[str, str] | None = None,
    more_special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
  ):
    self._backend = backend
    self._specials = dict(special_tokens or {})
    skipped = (backend.token_to_id(t) for t in [*self._specials.values(), *more_special_tokens])
    self._skipped = {i for i in skipped if i is not None}
    self._template = None if chat_template is None else _compile_template(chat_template)
    if backend.token_to_id(REGION) is None:
      backend.add_special_tokens([tokenizers.AddedToken(REGION, special=True, normalized=False)])
    self.region_id: int = backend.get_vocab(with_added_tokens=True)[REGION]
    self.eos_id = self._special_id("eos_token")
    self.pad_id = self._special_id("pad_token")
    self.bos_id = self._special_id("bos_token")

  @classmethod
  def from_folder(cls, folder: str | Path) -> "Tokenizer":
    """Reads tokenizer.json, or vocab.json + merges.txt, and tokenizer_config.json beside it.

    Raises:
      InputError: no tokenizer files, files that are not JSON, or files that disagree on an id.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json", default={})
    if (folder / "tokenizer.json").exists():
      try:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
      except Exception as error:  # the library raises bare Exception
        raise InputError(f"{folder / 'tokenizer.json'}: not a tokenizer file ({error})") from None
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
      backend = _byte_level_bpe(folder)
    elif (folder / "tokenizer.model").exists():
      raise InputError(
        f"{folder}: tokenizer.model (sentencepiece) alone is not read; put the tokenizer.json of "
        "the same release beside it"
      )
    else:
      raise InputError(f"{folder}: no tokenizer; tokenizer.json, or vocab.json and merges.txt")
    _add_tokens(backend, folder, config)
    config = _read_json(folder / "special_tokens_map.json", default={}) | config
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    more = [_content(token) for token in (more.values() if isinstance(more, Mapping) else more)]
    return cls(backend, _special_strings(config), more, _read_template(folder, config))

  def __len__(self) -> int:
    """Number of ids, added tokens included: the published size of the embedding table."""
    return self._backend.get_vocab_size(with_added_tokens=True)

  @property
  def last_id(self) -> int:
    """The largest id that is looked up in a table; `<region>` is not, it stands for an object."""
    vocabulary = self._backend.get_vocab(with_added_tokens=True)
    return max((i for token, i in vocabulary.items() if token != REGION), default=-1)

  def encode(self, text: str) -> list[int]:
    """Ids of `text`; special tokens spelled in it become their ids, none is put around it."""
    return self._backend.encode(text, add_special_tokens=False).ids

  @property
  def controls(self) -> list[str]:
    """The tokens that steer a model and that no text means, but for `<region>`."""
    added = self._backend.get_added_tokens_decoder()
    names = {t.content for i, t in added.items() if t.special or i in self._skipped}
    return sorted(names - {REGION})

  def encode_literally(self, control: str) -> list[int]:
    """Ids of the characters of a control token, which are not the token."""
    ids = [self.encode(part) for part in (control[:1], control[1:])]
    kept = [i for part in ids for i in part]
    return [i for i in kept if i != self._backend.token_to_id(control)]

  def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
    """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Nothing is stripped.

    `skip_special` leaves out the tokens that the config names special. As in the published code
    (the slow tokenizer), `<region>` is not one of them although its own entry says so.
    """
    kept = [int(i) for i in ids if not (skip_special and i in self._skipped)]
    return self._backend.decode(kept, skip_special_tokens=False)

  def id_of(self, token: str) -> int | None:
    """Id of a token's exact string, None if there is no such token."""
    return self._backend.token_to_id(token)

  @property
  def has_template(self) -> bool:
    """Whether there is a chat template to `render` by."""
    return self._template is not None

  def is_special(self, number: int) -> bool:
    """Whether an id is that of a special token, which no text is made of."""
    token = self._backend.get_added_tokens_decoder().get(number)
    return token is not None and token.special

  def render(
    self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
  ) -> str:
    """The dialogue as text by the checkpoint's chat template.

    Args:
      messages: dicts with `role` (system, user, assistant) and `content`.
      add_generation_prompt: end with the header of the assistant's next turn.
    """
    if self._template is None:
      raise InputError("the tokenizer has no chat template; put chat_template in its config file")
    try:
      return self._template.render(
        messages=list(messages), add_generation_prompt=add_generation_prompt, **self._specials
      )
    except jinja2.TemplateError as error:
      raise InputError(f"the chat template refuses the dialogue: {error}") from None

  def _special_id(self, name: str) -> int | None:
    return self._backend.token_to_id(self._specials[name]) if name in self._specials else None


def _compile_template(text: str) -> jinja2.Template:
  # The environment in which the templates of published checkpoints are written.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )

  def raise_exception(message: str):
    raise jinja2.TemplateError(message)

  environment.globals["raise_exception"] = raise_exception
  environment.filters["tojson"] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent
  )
  return environment.from_string(text)


def _byte_level_bpe(folder: Path) -> tokenizers.Tokenizer:
  model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.NFC()
  words = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), behavior="isolated")
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
  backend.decoder = decoders.ByteLevel()
  return backend


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
  """Adds the tokens that the config file or added_tokens.json name and the backend lacks."""
  if "added_tokens_decoder" in config:
    entries = {int(i): entry for i, entry in config["added_tokens_decoder"].items()}
  else:
    named = _read_json(folder / "added_tokens.json", default={})
    entries = {i: {"content": text, "special": True} for text, i in named.items()}
  for index, entry in sorted(entries.items()):
    text = entry["content"]
    flags = {k: entry[k] for k in ("single_word", "lstrip", "rstrip", "normalized") if k in entry}
    if backend.token_to_id(text) is None:
      special = entry.get("special", False)
      token = tokenizers.AddedToken(text, special=special, **({"normalized": False} | flags))
      (backend.add_special_tokens if special else backend.add_tokens)([token])
    if backend.token_to_id(text) != index:
      raise InputError(
        f"{folder}: token {text!r} has id {backend.token_to_id(text)} by the vocabulary "
        f"and {index} by its list of added tokens"
      )


def _special_strings(config: Mapping[str, Any]) -> dict[str, str]:
  names = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
  values = {f"{name}_token": config.get(f"{name}_token") for name in names}
  return {name: _content(token) for name, token in values.items() if token is not None}


def _content(token: str | Mapping[str, Any]) -> str:
  return token if isinstance(token, str) else token["content"]


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
  if (folder / "chat_template.jinja").exists():
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")
  template = config.get("chat_template")
  if template is None:
    template = _read_json(folder / "chat_template.json", default={}).get("chat_template")
  if isinstance(template, list):  # several templates by name
    template = {entry["name"]: entry["template"] for entry in template}.get("default")
  return template


def _read_json(path: Path, default: Any) -> Any:
  if not path.exists():
    return default
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: not JSON ({error})") from None
