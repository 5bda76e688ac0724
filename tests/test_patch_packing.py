"""Pictures in rows of a few sizes: none split, none lost, little executed in vain."""

import random

import pytest

from data_pipes.errors import InputError
from data_pipes.patch_packing import choose_buckets, grouped, pack_pictures, patches_of

BUCKETS = (512, 1024, 4096)


def test_every_picture_lies_in_one_row_that_holds_it():
  draw = random.Random(0)
  for _ in range(50):
    sizes = [draw.randint(16, 4096) for _ in range(draw.randint(1, 40))]
    rows = pack_pictures(sizes, BUCKETS)
    assert sorted(i for row in rows for i in row.pictures) == list(range(len(sizes)))
    for row in rows:
      assert row.size in BUCKETS
      assert sum(sizes[i] for i in row.pictures) <= row.size


def test_rows_shrink_and_small_rows_are_taken_where_they_fit_better():
  assert [row.size for row in pack_pictures([4000, 300], BUCKETS)] == [4096, 512]
  assert [row.size for row in pack_pictures([500, 500, 1000], BUCKETS)] == [1024, 1024]
  assert pack_pictures([], BUCKETS) == []


def test_a_picture_larger_than_all_rows_is_refused():
  with pytest.raises(InputError, match="4097 patches; accepted: up to 4096"):
    pack_pictures([4097], BUCKETS)


def test_four_sizes_suit_clips_and_images_of_any_size():
  draw = random.Random(1)
  made = [
    [draw.randint(800, 8192)] if draw.random() < 0.5
    else [32768 // frames // 4 * 4] * frames
    for frames in draw.choices((4, 8, 30, 60), k=16)
  ]  # fmt: skip
  for together in (1, 3):
    calls = grouped(made, together)
    buckets = choose_buckets(calls, largest=32768)
    assert len(buckets) <= 4
    assert max(buckets) >= 32768
    executed = sum(patches_of(pack_pictures(call, buckets)) for call in calls)
    assert executed <= 1.1 * sum(map(sum, calls))
