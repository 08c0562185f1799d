"""What a call of a prefill launches on a card, what crosses the link, and that the host waits for nothing meanwhile."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Thread

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from prefill_calls import HEADS, TOKEN_BYTES, one_layer

from tieredkv.cache.context_digests import ContextDigests
from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.prefill import Past
from tieredkv.cache.question import Question
from tieredkv.memory.host import HostLayer

CALL = 2048
RESIDENT = {"gpu_kv_gb": 4.0}
STREAMED = {"gpu_kv_gb": 0.5, "host_kv_bits": 16}
PACKED = {"gpu_kv_gb": 0.5, "host_kv_bits": 8}
FLASH, MERGE = "_scaled_dot_product_flash_attention", "lerp"
DIGESTS = CALL * 4 * 128 // 4
"""Bytes of a call's sketches: 4 bits for half the dimensions of each KV head."""
FITTED = 4 * 128 * (64 + 64 + 1) * 4
"""Bytes of what sketches are fitted to."""
FIT = 2 * 4 * 2 * 128 * 4
"""Bytes of what 8 bits are fitted to."""


def called(patch, options, *calls, question=None):
    """What the last of these calls has done."""
    with one_layer(patch, 32768, **options) as one:
        for tokens in calls:
            made = one.call(tokens)
        return made if question is None else one.call(question, Question(max_new_tokens=8, rows=question))


@pytest.mark.parametrize("before", [2, 5])
def test_residents_and_new_tokens_are_attended_to_at_once(monkeypatch, before):
    """However many they are."""
    made = called(monkeypatch, RESIDENT, *[CALL] * (before + 1))
    assert made.count(FLASH) == 1
    assert made.count(MERGE) == 0
    assert len(made.launches) == 17, made.launches
    past, new = before * CALL * TOKEN_BYTES, CALL * TOKEN_BYTES
    attended = 2 * HEADS * CALL * 128 * 2 + HEADS * CALL * 4 + past + new
    flash = sum(nbytes for name, (_, nbytes) in made.by_name.items() if FLASH in name)
    assert 0 <= flash - attended < 64  # the state of a dropout that there is not


@pytest.mark.parametrize("options", [RESIDENT, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("first", [CALL, CALL - 3], ids=["aligned", "unaligned"])
def test_the_host_waits_for_nothing(monkeypatch, options, first):
    made = called(monkeypatch, options, first, *[CALL] * 5)
    assert made.waits == []
    assert made.blocking == []


def test_only_what_is_missing_crosses_the_link(monkeypatch):
    made = called(monkeypatch, RESIDENT, CALL, CALL, CALL)
    assert made.moved(to_card=True) == FITTED
    assert made.moved(to_card=False) == CALL * TOKEN_BYTES + DIGESTS
    assert {link.stream for link in made.links if link.nbytes > DIGESTS} == {"copies"}


@pytest.mark.parametrize(("options", "launches", "token_bytes"), [(STREAMED, 36, 2048), (PACKED, 80, 1040)])
def test_the_past_is_streamed_in_few_blocks(monkeypatch, options, launches, token_bytes):
    with one_layer(monkeypatch, 32768, **options) as one:
        for _ in range(7):
            made = one.call(CALL)
        resident = one.cache.device_tier.residents[0]
        missing = 6 * CALL - resident.length
    assert 0 < missing < 4 * CALL
    assert made.count(FLASH) == 3
    assert made.count(MERGE) == 2
    assert len(made.launches) == launches, made.launches
    again = CALL if options is PACKED else 0  # digests are of what was packed
    fits = 3 * FIT if options is PACKED else 0  # to encode, to decode the past, and to digest
    assert made.moved(to_card=True) == (missing + again) * token_bytes + FITTED + fits


def test_a_question_waits_once_for_its_scores(monkeypatch):
    made = called(monkeypatch, RESIDENT, CALL, CALL, CALL, question=32)
    assert len(made.blocking) == 1
    assert made.waits == []


FAULTS = {
    "a strided copy": (HostLayer, "_put_part", lambda host, chunk, offset, fields: [
        own[:, offset : offset + new.shape[1]].copy_(new, non_blocking=True)
        for own, new in zip(host.codec.fields(host._arena.open(chunk)), fields, strict=True)
    ]),
    "digests at once": (ContextDigests, "_keep", lambda digests, first, made: made.cpu()),
    "keys read again": (ContextDigests, "_of_new", lambda digests, first, stop, new: None),
    "blocks of residents": (Past, "joined", lambda past, new: None),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(monkeypatch, fault):
    calls = (CALL - 3, CALL, CALL, CALL + 3)
    good = called(monkeypatch, RESIDENT, *calls)
    monkeypatch.setattr(*FAULTS[fault])
    bad = called(monkeypatch, RESIDENT, *calls)
    assert (len(good.blocking), good.moved(to_card=True), good.count(MERGE)) < (
        len(bad.blocking),
        bad.moved(to_card=True),
        bad.count(MERGE),
    )


@pytest.fixture
def slow(monkeypatch):
    """Fits that do not end before they are told to: their works and what waits for them."""
    begun = []

    def beside(tier, work, later=False):
        begun.append((work, future := Future()))
        return future

    with one_layer(monkeypatch, 32768, **RESIDENT) as one, monkeypatch.context() as patch:
        patch.setattr(DeviceTier, "beside", beside)
        yield one, begun


def test_a_prompt_is_read_while_digests_are_fitted(slow):
    one, begun = slow
    before = [one.call(CALL) for _ in range(3)][-1]
    digests = one.cache.tiered_layers[0].digests
    assert len(begun) == 1
    assert (before.waits, digests.packed.shape[1]) == ([], 0)
    work, future = begun[0]
    future.set_result(work())
    assert one.call(CALL).waits == []
    assert digests.packed.shape[1] == 4 * CALL // 8


def test_a_fit_reads_no_key_that_has_been_replaced(slow):
    one, begun = slow
    layer = one.cache.tiered_layers[0]
    for _ in range(2):
        one.call(CALL)
    work, future = begun[0]
    cut = Thread(target=layer.truncate, args=(CALL,))
    cut.start()
    cut.join(0.2)
    assert cut.is_alive()
    future.set_result(work())
    cut.join()
    assert layer.prompt_length == CALL
