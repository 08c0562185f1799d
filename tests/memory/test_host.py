"""The host tier stores every token in chunks, whatever the sizes they are appended in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.errors import BudgetError
from tieredkv.memory.host import HostLayer
from tieredkv.memory.limits import check_host_memory


@given(st.lists(st.integers(1, 23), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_appended_tokens_are_read_back(sizes, chunk, reserved):
    host = HostLayer(2, 3, chunk, torch.float32)
    host.reserve(reserved)
    keys = torch.randn(2, sum(sizes), 3)
    done = 0
    for size in sizes:
        host.append(keys[:, done : done + size], -keys[:, done : done + size])
        done += size
    assert host.length == done
    torch.testing.assert_close(host.keys().flatten(1, 2)[:, :done], keys)
    torch.testing.assert_close(host.decoded(0, done), (keys, -keys))
    index = torch.randperm(done)[:5]
    got_keys, got_values = host.tokens(1, index)
    torch.testing.assert_close(got_keys, keys[1, index])
    torch.testing.assert_close(got_values, -keys[1, index])


def test_truncating_and_appending_again_overwrites():
    host = HostLayer(1, 1, 4, torch.float32)
    host.append(torch.arange(10.0).view(1, 10, 1), torch.zeros(1, 10, 1))
    host.truncate(6)
    host.append(torch.full((1, 3, 1), 9.0), torch.zeros(1, 3, 1))
    assert host.keys().flatten()[:9].tolist() == [0, 1, 2, 3, 4, 5, 9, 9, 9]


def test_truncating_to_more_than_the_length_raises():
    with pytest.raises(ValueError, match="cannot keep 1 of 0"):
        HostLayer(1, 1, 4, torch.float32).truncate(1)


def test_appending_tokens_one_by_one_seldom_reallocates():
    host, places = HostLayer(1, 1, 4, torch.float32), set()
    token = torch.zeros(1, 1, 1)
    for _ in range(700):
        host.append(token, token)
        places.add(host.capacity)
    assert len(places) <= 4
    assert host.capacity <= 2 * 700


def test_a_chunk_is_one_contiguous_piece():
    host = HostLayer(2, 3, 4, torch.float32)
    host.reserve(20)
    host.append(torch.zeros(2, 20, 3), torch.zeros(2, 20, 3))
    assert host.chunks()[1, 2].is_contiguous()


@pytest.mark.parametrize("with_values", [True, False])
def test_staging_copies_keys_and_on_request_values(with_values):
    host = HostLayer(2, 5, 4, torch.float32)
    keys, values = torch.randn(2, 12, 5), torch.randn(2, 12, 5)
    host.append(keys, values)
    staged = torch.zeros(2, 3, host.codec.chunk_bytes, dtype=torch.uint8)
    moved = host.stage(0, 3, staged, with_values)
    staged_keys, staged_values = host.codec.fields(staged)
    assert torch.equal(staged_keys.flatten(1, 2), keys)
    assert torch.equal(staged_values.flatten(1, 2), values * with_values)
    assert moved == 2 * 3 * 4 * 5 * 4 * (1 + with_values)


@given(st.integers(1, 100), st.integers(1, 70))
def test_blocks_cover_all_chunks_once(tokens, block):
    host = HostLayer(1, 1, 8, torch.float32)
    ranges = list(host.blocks(0, tokens, block))
    covered = [chunk for start, stop in ranges for chunk in range(start, stop)]
    assert covered == list(range(-(-tokens // 8)))
    assert all((stop - start) * 8 <= max(block, 8) for start, stop in ranges)


def test_closing_frees_the_memory():
    host = HostLayer(1, 1, 8, torch.float32)
    host.append(torch.zeros(1, 9, 1), torch.zeros(1, 9, 1))
    host.close()
    assert (host.nbytes, host.length) == (0, 0)


def test_too_little_host_memory_raises_with_both_sizes():
    with pytest.raises(BudgetError, match=r"the cache needs .* GiB of host memory, .* GiB is available: lower fps"):
        check_host_memory(2**60, "the cache", "lower fps")
