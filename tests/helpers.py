"""What several test files need: stock answers, logits, gates, and caps that are shares of the full cache."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria

from tieredkv.cache.retrieval import Retrieval
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import POLICY_FIELDS
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.switch import use_attention
from tieredkv.planning.decode_plan import DecodePlan
from tieredkv.policy.presets import POLICIES
from tieredkv.session.video_session import VideoSession

PATIENCE_S = 60
"""Seconds after which a wait counts as a hang. Nothing that works comes near it, on a busy machine either."""


QWEN3_5: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
"""Sizes of Gated DeltaNet, and of heads of which a part is rotated."""
TEXT_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3_text": (  # a window much shorter than the prompts, in the first layer and the last
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            "sliding_window": 33,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "pad_token_id": None,
        },
    ),
    "gemma4_text": (  # full layers are wider, and two of them attend to keys and values of an earlier one
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 6,
            "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "full", "sliding", "full", "full")],
            "sliding_window": 33,
            "num_kv_shared_layers": 3,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "final_logit_softcapping": 30.0,
            "pad_token_id": None,
        },
    ),
    "qwen3_5_text": (  # every fourth layer is full attention, which rotates a part of the head
        "Qwen3_5TextConfig",
        {
            "num_hidden_layers": 8,
            **QWEN3_5,
        },
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeTextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            **QWEN3_5,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "ministral": (
        "MinistralConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 33,
            "head_dim": 16,
        },
    ),
    "ministral3": (  # scales queries by their position
        "Ministral3Config",
        {
            "head_dim": 16,
            "pad_token_id": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 64.0,
                "original_max_position_embeddings": 64,
                "max_position_embeddings": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "phi3": (  # rotates a part of the head
        "Phi3Config",
        {
            "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {
            "num_hidden_layers": 6,
            "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
            "pad_token_id": None,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "full_attention", "conv"],
            "num_dense_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "pad_token_id": None,
        },
    ),
    "lfm3": (
        "Lfm3Config",
        {
            "num_hidden_layers": 6,
            "layer_types": ["conv", "conv", "full_attention", "conv", "sliding_attention", "full_attention"],
            "sliding_window": 33,
            "head_dim": 16,
            "pad_token_id": None,
        },
    ),
}
"""Name and fields of the config of every decoder, by its `model_type`: what differs from `text_config`'s sizes."""


def text_config(kind: str) -> Any:
    """A config of three layers, four query heads and two KV heads; of more, where some are of another type.

    Skips the test where the installed transformers does not have the model.
    """
    import transformers

    name, fields = TEXT_CONFIGS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.1,
    }
    return getattr(transformers, name)(**{**sizes, **fields})


def random_text_model(kind: str) -> Any:
    """A text model of `text_config` with random weights, always the same ones."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(text_config(kind)).eval()
    if kind.startswith("gemma4"):  # it does not scale its dot products: norms of 1 let rounding decide where it attends
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("q_norm.weight"):
                    weight.mul_(weight.numel() ** -0.5)
    return model


def digest_nbytes(retrieval: Retrieval) -> int:
    """Device bytes of a layer's digests and the state that they are read with."""
    assert retrieval.ranking is not None
    return retrieval.ranking.digests.nbytes + retrieval.ranking._fitted.nbytes


def at_once(work: Callable[[], Any], later: bool = False) -> Future[Any]:
    """In place of `DeviceTier.beside`: what a thread would have computed."""
    future: Future[Any] = Future()
    future.set_result(work())
    return future


def decoded(model: Any, ids: torch.Tensor, steps: int, **options: Any) -> tuple[torch.Tensor, DecodePlan, int]:
    """Logits of steps after 500 tokens in which every head ranks chunks, the plan, and the bytes copied ahead."""
    tiers = {**pressed(model, 600, 0.5), "chunk_tokens": 8, "text_window": 16, "theta": 2.0, **options}
    with (
        torch.no_grad(),
        use_attention(model),
        TieredCache(model.config, **tier_options(**tiers), copies=LateCopies()) as cache,
    ):
        model(ids[:, :500], **cache_argument(cache))
        cache.seal()
        logits = [model(ids[:, place : place + 1], **cache_argument(cache)).logits for place in range(steps)]
        assert cache.decoding is not None
        plan = cache.decoding._phases[0].plan
        cache.finish()
        return torch.cat(logits), plan, cache.counters.prefetched_bytes


class LateCopies:
    """A prefetcher whose copies happen at the last moment: when they are waited for."""

    def __init__(self) -> None:
        self.outstanding: dict[Hashable, Callable[[], int]] = {}

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        assert key not in self.outstanding, "a copy is outstanding: wait for it first"
        self.outstanding[key] = copy

    def wait(self, key: Hashable) -> int:
        return self.outstanding.pop(key, lambda: 0)()

    def drain(self) -> None:
        while self.outstanding:
            self.wait(next(iter(self.outstanding)))

    def close(self) -> None:
        self.drain()


class Gate(StoppingCriteria):
    """Counts the steps of an answer and, at each but the first `free`, waits to be opened."""

    def __init__(self, free: int = 0) -> None:
        self.steps, self._free, self._is_open = 0, free, False
        self._changed = threading.Condition()

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def wait_for_step(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.steps >= number, PATIENCE_S), "it hangs"

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with self._changed:
            self.steps += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._is_open or self.steps <= self._free, PATIENCE_S), "not opened"
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


NEAR = {torch.float32: 2**-14, torch.float16: 2**-8, torch.bfloat16: 2**-6}
"""How far apart the same sums in another order may be, as a share of the largest: 512, 4 and 2 epsilons of the dtype.
Those of the tiny models are at most 30 apart in float32, whatever instructions and threads a processor has; a token
left out, or a page of another head, changes a thousandth or more."""


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal, but for the order in which a processor adds up. dtype: that of the sums, if not `want`'s.

    Relative to the largest number and not to each one, as a sum is off by a share of its largest terms. Where the
    operations and shapes are the same, nothing may differ: that is `torch.equal`.
    """
    largest = float(want.detach().abs().nan_to_num(0, 0, 0).max())
    torch.testing.assert_close(got, want, rtol=0, atol=NEAR[dtype or want.dtype] * largest)


def assert_same_moments(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """The same spans, with weights that may differ by rounding: a busy machine adds them up in another order."""
    weights = [moment["weight"] for moment in want]
    assert [moment["weight"] for moment in got] == pytest.approx(weights, rel=1e-4, abs=1e-6)
    assert [{**moment, "weight": 0} for moment in got] == [{**moment, "weight": 0} for moment in want]


def ended(thread: threading.Thread) -> bool:
    """Wait for the end of a thread that was asked to stop."""
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def cap_share(model: Any, tokens: int, share: float) -> float:
    """`gpu_kv_gb` that is `share` of a full cache of `tokens` tokens."""
    return share * tokens * model_shape(model.config, model.dtype).token_bytes / GIB


def tier_options(policy: str = "hybridkv", **options: Any) -> dict[str, Any]:
    """Keywords for a TierConfig or a session: fields of a policy among the options change the policy of that name."""
    changes = {name: options.pop(name) for name in POLICY_FIELDS & options.keys()}
    return {**options, "policy": replace(POLICIES[policy], **changes)}


def pressed(model: Any, tokens: int, share: float) -> dict[str, float]:
    """`gpu_kv_gb` as of `cap_share`, and below 1 a `budget_ratio` of half as much: chunks must be chosen, although in 8
    bits much less than a cap of float32 tokens would hold all of them."""
    chosen = {"budget_ratio": share / 2} if share < 1 else {}
    return {"gpu_kv_gb": cap_share(model, tokens, share), **chosen}


def stock_inputs(
    processor: Any,
    frames: np.ndarray,
    question: str,
    fps: float = 4.0,
    earlier: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> Any:
    """Model inputs made by transformers alone. earlier: questions and answers of the conversation before."""
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for number, (asked, answer) in enumerate((*earlier, (question, None))):
        video = [] if number else [{"type": "video"}]
        messages.append({"role": "user", "content": [*video, {"type": "text", "text": asked}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    count = len(frames)
    video: Any = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if type(processor).__name__ == "SmolVLMProcessor":  # takes a list of videos for each text
        video = [video]
    metadata = {"fps": fps, "total_num_frames": count, "frames_indices": list(range(count)), "duration": count / fps}
    with warnings.catch_warnings():  # some processors give torch's tensors to NumPy, which is not our call
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)
        return processor(
            text=[text],
            videos=[video],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )


class RecordLogits:
    """A logits processor that keeps what it sees; give it to stock `generate` and to a session alike."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.clone())
        return scores


def session_logits(session: VideoSession, question: str, new: int) -> torch.Tensor:
    """Logits `(new, vocabulary)` of a greedy answer."""
    record = RecordLogits()
    session.ask(question, max_new_tokens=new, do_sample=False, logits_processor=[record])
    return torch.cat(record.seen)


def stock_logits(model: Any, inputs: Any, new: int, **extra: Any) -> torch.Tensor:
    """The same from transformers' own `generate`."""
    out = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True, **extra
    )
    return torch.cat(out.logits)


def assert_conversations_equal_stock(language_model: Any, packed: Any, hidden: torch.Tensor) -> None:
    """Hidden states of packed conversations (`tiny.packed`) are those that stock transformers gives each alone."""
    for video in range(len(packed.conversation)):
        for conversation in range(int(packed.conversation.max()) + 1):
            rows = (packed.conversation[video] == conversation).nonzero().flatten()
            text = language_model.embed_tokens(packed.ids[video, rows])
            positions = packed.positions[video, rows].expand(3, -1)
            expected = language_model(
                inputs_embeds=torch.cat([packed.prefix[video], text])[None],
                position_ids=torch.cat([packed.prefix_positions[video], positions], dim=1)[:, None],
                use_cache=False,
            ).last_hidden_state[0, -len(rows) :]
            assert_near(hidden[video, rows], expected)
