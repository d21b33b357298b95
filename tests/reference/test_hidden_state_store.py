"""Shards on disk: rows by content, kills and damage survived."""

import logging

import pytest
import torch

from ema_scale.reference.hidden_state_store import HiddenStateStore, row_key


def rows_of(*lengths, start=0):
    return {row_key([start + i] * n): torch.randn(n, 4, dtype=torch.bfloat16) for i, n in enumerate(lengths)}


def test_what_is_added_is_read_back_to_the_bit_also_by_another_process(tmp_path):
    one, two = rows_of(3, 1, 7), rows_of(2, start=10)
    shelf = HiddenStateStore(tmp_path / "last")
    shelf.add(one)
    shelf.add(two)
    for reader in (shelf, HiddenStateStore(tmp_path / "last")):
        for key, states in {**one, **two}.items():
            assert key in reader and torch.equal(reader.read(key), states)
    assert row_key([9]) not in shelf
    with pytest.raises(KeyError):
        shelf.read(row_key([9]))


def test_keys_tell_rows_apart():
    assert len({row_key(ids) for ids in ([1], [1, 0], [0, 1], [], [256], [1, 1])}) == 6


@pytest.mark.parametrize("harm", ["flip", "cut", "no entry", "torn entry"])
def test_a_damaged_shard_is_dropped_and_others_stay(tmp_path, harm, caplog):
    one, two = rows_of(3, 5), rows_of(2, start=10)
    shelf = HiddenStateStore(tmp_path)
    shelf.add(one)
    (data,) = tmp_path.glob("*.safetensors")
    shelf.add(two)
    entry = data.with_suffix(".json")
    if harm == "flip":
        whole = bytearray(data.read_bytes())
        whole[-1] ^= 1
        data.write_bytes(whole)
    elif harm == "cut":
        data.write_bytes(data.read_bytes()[:-2])
    elif harm == "no entry":
        entry.unlink()
    else:
        entry.write_text(entry.read_text()[:20])
    (tmp_path / ".x.safetensors.1.tmp").touch()
    again = HiddenStateStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        again.clean([*one, *two])
    assert all(key not in again for key in one) and all(torch.equal(again.read(k), s) for k, s in two.items())
    assert ("damaged" in caplog.text) == (harm in ("flip", "cut"))
    assert not data.exists() and not list(tmp_path.glob(".*.tmp"))
    again.add(one)
    assert all(torch.equal(HiddenStateStore(tmp_path).read(k), s) for k, s in one.items())
