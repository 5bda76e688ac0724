"""MeViS: meta_expressions.json, mask_dict.json, and JPEGImages, in one folder."""

from collections.abc import Iterator

from data_pipes.importers.captions import expressions
from data_pipes.importers.marked import Left, Marked, Media, usable
from data_pipes.importers.parts import Source, checked, load_json, part


def read(source: Source, left: Left) -> Iterator[Media]:
  """A folder of frames each, JPEGImages/NAME; an expression may be about several objects."""
  folder = source.path.parent if source.path.is_file() else source.path
  file = folder / "meta_expressions.json"
  content = load_json(file)
  masks_file = folder / "mask_dict.json"
  masks = checked(load_json(masks_file), dict, str(masks_file))
  for name, video in part(content, "videos", dict, str(file)).items():
    where = f"{file}: {name}"
    frames = [checked(frame, str, where) for frame in part(video, "frames", list, where)]
    path = source.located(f"JPEGImages/{name}")
    numbers = source.numbers(path, frames)
    texts = [text for _, text in expressions({"videos": {name: video}}, str(file), ("anno_id",))]
    media = Media("video", path, None, [], keys=(name,))
    for key in dict.fromkeys(key for text in texts for key in text.objects):
      place = f"{masks_file}: {key}"
      if key not in masks:
        continue  # the text about it is counted
      marked = Marked("", (key,))
      for k, mask in enumerate(part(masks, key, list, str(masks_file))):
        mask = usable(mask, media.size, f"{place}: frame {k}", left)
        if mask is None:
          continue
        number = numbers[k] if k < len(numbers) else None
        if number is None:
          left.add("frames that the folder lacks", f"{place}: frame {k}")
          continue
        marked.masks[number] = mask
        media.size = media.size or tuple(mask["size"])
      media.objects.append(marked)
    for text in texts:
      if text.objects:
        media.texts.append(text)
      else:
        left.add("expressions without objects (no masks are published)", f"{where}: {text.text!r}")
    yield media
