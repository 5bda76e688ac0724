"""`vr data show`: one item, its frames with the objects drawn on them, and the dialogue."""

from dataclasses import dataclass, field

from vr_jax.commands.options import MEDIA, RECORDS


@dataclass(frozen=True)
class Show:
  file: str = field(metadata=RECORDS)
  item: str = field(
    metadata={"positional": True, "help": "its number, or id=ID", "metavar": "ITEM"}
  )
  media: str = field(default=".", metadata=MEDIA)
  out: str = field(
    default="item.html", metadata={"help": "a .html page (default), or .png or .jpg"}
  )


def run(options: Show) -> None:
  from data_pipes.show import find_item, write_item

  record, item = find_item(options.file, options.item)
  print(write_item(options.out, record, item, options.media))
