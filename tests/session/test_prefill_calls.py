"""In which forward calls a prompt is prefilled. The rows that are scored are of the last, which is therefore full."""

from __future__ import annotations

import pytest
from helpers import cap_share

import tieredkv

QUESTION, CALL = "what colour was the star ?", 5


@pytest.fixture
def calls(video_model):
    """Tokens of each forward call of the decoder."""
    tokens: list[int] = []
    hook = video_model.get_decoder().register_forward_pre_hook(
        lambda module, args, options: tokens.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    yield tokens
    hook.remove()


def test_the_last_call_of_a_question_is_full(video_model, processor, frames, calls):
    options = {"processor": processor, "fps": 4, "prefill_chunk": CALL, "gpu_kv_gb": 1}
    with tieredkv.open_session(video_model, frames[:20], **options) as session:
        calls.clear()
        prompt = session.ask(QUESTION, max_new_tokens=1).stats.prompt_tokens
        asked = prompt - session.head_tokens - session.video.tokens
    assert asked % CALL
    assert calls == [asked % CALL, *[CALL] * (asked // CALL)]


def test_a_question_of_several_calls_copies_what_the_plan_says(video_model, processor, frames):
    options = {"processor": processor, "fps": 4.0, "prefill_chunk": CALL, "chunk_tokens": 8}
    options["gpu_kv_gb"] = cap_share(video_model, 260, 0.7)
    with tieredkv.open_session(video_model, frames, **options) as session:
        stats = session.ask(QUESTION, max_new_tokens=1).stats
        streamed = session.ingest_stats.streamed_bytes + session._cache.device_tier.transfer.streamed_bytes
        asked = stats.prompt_tokens - session.head_tokens - session.video.tokens
    planned = tieredkv.plan(video_model, frames, question_tokens=asked, max_new_tokens=1, **options)
    assert asked > 2 * CALL
    assert planned.prompt_tokens == stats.prompt_tokens
    assert planned.prefill_copy_bytes == streamed > 0
