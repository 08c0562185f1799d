"""The forward calls of a prefill. The scored rows are in the last call, which is therefore full."""

from __future__ import annotations

import pytest

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
