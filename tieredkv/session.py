"""VideoSession: one video ingested once, any number of questions, each answered as if asked first."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from tieredkv import decode, models, sizes
from tieredkv.attention.interface import use_attention
from tieredkv.cache import TieredCache
from tieredkv.config import TierConfig
from tieredkv.errors import PromptError, TieredKVError, UnsupportedModelError, VideoError
from tieredkv.memory.host import check_host_memory
from tieredkv.models.base import EncodedVideo, Positions
from tieredkv.progress import Stages
from tieredkv.stats import Generation, Stats
from tieredkv.video.encode import encode_video
from tieredkv.video.frames import load_frames

DEFAULT_FPS = 2.0
"""Frames sampled per second where neither the caller nor the processor says (Qwen2.5-VL's own rate)."""
DEFAULT_NEW_TOKENS = 256
"""`max_new_tokens` where neither the caller nor a generation config says."""
QUESTION_ROOM = 256
"""Tokens of host memory set aside beyond the video for the longest question; a longer one makes the tier grow."""


class VideoSession:
    """A video's keys and values in two tiers, and the questions asked of them.

    Owns all its state: nothing is kept on the model, so sessions on one model do not see each other. Made by
    `tieredkv.open_session`. A context manager; `close` frees both tiers.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        tiers: TierConfig,
        positions: Positions = "published",
        progress: bool = False,
    ) -> None:
        """model, processor: as transformers loads them. The rest as in `tieredkv.open_session`."""
        self.family = models.video_family(model.config)
        device = model.get_input_embeddings().weight.device
        if device.type != "cpu":
            raise UnsupportedModelError(
                f"the model is on {device}; tieredkv runs on the CPU only so far: load it there."
            )
        for part in ("video_processor", "tokenizer", "apply_chat_template"):
            if not hasattr(processor, part):
                kind = type(processor).__name__
                raise UnsupportedModelError(f"processor is a {kind} without {part}: give the model's AutoProcessor.")
        self.model, self.processor, self.tiers = model, processor, tiers
        self.positions: Positions = positions
        self.ingest_s = 0.0
        self.video: EncodedVideo | None = None
        self._stages = Stages(progress)
        self._cache: TieredCache | None = None
        self._head = ""
        self._head_ids: torch.Tensor = torch.empty((1, 0), dtype=torch.long)
        self._closed = False
        self._prefix = 0

    # ---- ingest

    def ingest(
        self,
        video: Any,
        *,
        fps: float | None = None,
        source_fps: float | None = None,
        max_frames: int | None = None,
        question: str = "?",
        max_new_tokens: int = 1,
    ) -> None:
        """Decode, encode and prefill the video. Once per session.

        video, fps, source_fps, max_frames: as in `tieredkv.open_session`. question, max_new_tokens: if what will be
        asked is known, it counts in the check that the budget suffices, made before anything is prefilled. Raises
        `VideoError` or `BudgetError` and leaves the session without a video.
        """
        self._check_open()
        if self.video is not None:
            raise TieredKVError("this session has its video already: open another session for another video.")
        started = time.perf_counter()
        rate = (getattr(self.processor.video_processor, "fps", None) or DEFAULT_FPS) if fps is None else fps
        with self._stages("decode", "frames") as bar:
            frames = load_frames(video, rate, source_fps, max_frames, bar)
        try:
            inputs = self.family.preprocess(self.processor, frames.pixels, frames.fps)
        except ValueError as error:
            _, height, width, _ = frames.pixels.shape
            raise VideoError(f"the model's processor refuses frames of {width}x{height}: {error}") from None
        rate = frames.fps
        del frames
        head, tail = self._template(question)
        self._head, self._head_ids = head, self._tokenize(head)
        visual = math.prod(self.family.grid(self.model, inputs))
        room = self._check_memory(visual, self._tokenize(tail).shape[1], max_new_tokens)
        with self._stages("encode", "tokens") as bar:
            encoded = encode_video(self.family, self.model, inputs, rate, bar)
        del inputs
        try:
            self._prefill_video(encoded, room)
        except BaseException:
            self._drop_cache()
            raise
        self.video = replace(encoded, features=None)
        self._prefix = self.head_tokens + encoded.tokens
        self.ingest_s = time.perf_counter() - started

    def _check_memory(self, visual: int, asked: int, max_new_tokens: int) -> int:
        """Refuse what neither tier can hold, before the costly stages; prompt tokens to make room for in the host tier.

        visual, asked: tokens of the video and of the text after it.
        """
        shape = model_shape(self.model.config, self._dtype)
        tokens = self.head_tokens + visual + asked
        sizes.check_cap(shape, self.tiers, sizes.lay_out(self.tiers, tokens, asked, max_new_tokens), asked)
        room = tokens + QUESTION_ROOM
        what = f"the cache of {tokens:,} tokens"
        check_host_memory(room * shape.token_bytes, what, "lower fps or max_frames")
        return room

    @torch.no_grad()
    def _prefill_video(self, video: EncodedVideo, room: int) -> None:
        start, total = self.head_tokens, self.head_tokens + video.tokens
        cache = TieredCache(self.model.config, self.tiers, prompt_tokens=room)
        cache.auto_seal = False
        cache.visual = torch.arange(total) >= start
        self._cache = cache
        positions, _ = self.family.positions(self.model, start, video, 0, self.positions)
        cache.text_rows = 0
        with use_attention(self.model), self._stages("prefill", "tokens") as bar:
            for begin in range(0, total, self.tiers.prefill_chunk):
                stop = min(begin + self.tiers.prefill_chunk, total)
                embeddings = self._prompt_embeddings(video, begin, stop)
                self.family.decode(self.model, embeddings, positions[:, begin:stop], cache)
                bar(stop, total)

    def _prompt_embeddings(self, video: EncodedVideo, begin: int, stop: int) -> torch.Tensor:
        """Embeddings `(1, stop - begin, hidden)` of a stretch of the prompt before the question."""
        start = self._head_ids.shape[1]
        parts = []
        if begin < start:
            parts.append(self.family.embed(self.model, self._head_ids[:, begin : min(stop, start)].to(self._device)))
        if stop > start:
            assert video.features is not None
            features = video.features[max(0, begin - start) : stop - start]
            parts.append(features.unsqueeze(0).to(self._device, self._dtype))
        return torch.cat(parts, dim=1)

    # ---- questions

    def ask(self, prompt: str, *, trace: bool = False, **options: Any) -> Generation:
        """Answer a question about the video, as if it were the first asked.

        options: transformers' generation options (`max_new_tokens`, `do_sample`, `temperature`, `stop_strings` ...,
        `streamer`, `stopping_criteria`, `generation_config`). trace: record which chunks each step attended to.
        Raises `PromptError`, `OptionError` or `BudgetError`; the session can be asked again after any of them.
        """
        self._check_open()
        if self.video is None or self._cache is None:
            raise TieredKVError("this session has no video yet: call ingest first.")
        with decode.ending_on_error(options.get("streamer")):
            decode.check_options(options, model_config=self.model.generation_config)
            check_prompt(prompt)
            head, tail = self._template(prompt)
            if head != self._head:
                raise PromptError("the chat template puts the prompt before the video: that is not supported.")
            self._cache.truncate(self._prefix)
            self._cache.counters.trace = [] if trace else None
            try:
                return self._answer(self._cache, self._tokenize(tail), options)
            finally:
                self._cache.truncate(self._prefix)

    @torch.no_grad()
    def _answer(self, cache: TieredCache, tail_ids: torch.Tensor, options: dict[str, Any]) -> Generation:
        assert self.video is not None
        started = time.perf_counter()
        family, model, video = self.family, self.model, self.video
        prefix, tail = cache.get_seq_length(), tail_ids.shape[1]
        new_tokens = self.new_tokens(options)
        cache.new_tokens = new_tokens
        layout = sizes.lay_out(self.tiers, prefix + tail, tail, new_tokens)
        sizes.check_cap(cache.shape, self.tiers, layout, tail)
        cache.transfer.reset()
        positions, next_position = family.positions(model, self._head_ids.shape[1], video, tail, self.positions)
        with use_attention(model):
            # The question's last rows, which classify the heads, go in one call.
            first_calls = max(0, tail - self.tiers.prefill_chunk)
            for begin, stop in _spans(first_calls, self.tiers.prefill_chunk, tail):
                cache.text_rows = min(stop - begin, self.tiers.text_window) if stop == tail else 0
                embeddings = family.embed(model, tail_ids[:, begin:stop].to(self._device))
                hidden = family.decode(model, embeddings, positions[:, prefix + begin : prefix + stop], cache)
            logits = family.logits(model, hidden[:, -1])
            cache.seal()
            axes = positions.shape[0]

            def step(token: int) -> torch.Tensor:
                nonlocal next_position
                ids = torch.tensor([[token]], device=self._device)
                place = torch.full((axes, 1), next_position)
                next_position += 1
                hidden = family.decode(model, family.embed(model, ids), place, cache)
                return family.logits(model, hidden[:, -1])

            placeholder = self._tokenize(family.video_token(self.processor)).expand(1, video.tokens)
            prompt_ids = torch.cat((self._head_ids, placeholder, tail_ids), dim=1).to(self._device)
            decoded = decode.run(model, prompt_ids, logits, step, new_tokens, options, self._tokenizer)
        return self._generation(cache, decoded, started, prefix + tail)

    def _generation(
        self, cache: TieredCache, decoded: decode.Decoded, started: float, prompt_tokens: int
    ) -> Generation:
        assert self.video is not None
        cache.finish()
        counters, count = cache.counters, len(decoded.token_ids)
        moved = counters.warm_bytes + counters.missed_bytes + counters.prefetched_bytes + cache.transfer.streamed_bytes
        later = (decoded.last_token_at - decoded.first_token_at) * 1000
        stats = Stats(
            prompt_tokens=prompt_tokens,
            visual_tokens=self.video.tokens,
            new_tokens=count,
            kv_full_bytes=(prompt_tokens + count) * cache.shape.token_bytes,
            kv_cap_bytes=self.tiers.cap_bytes,
            kv_device_peak_bytes=cache.ledger.peak_bytes,
            kv_host_bytes=cache.host_bytes,
            static_heads=counters.static_heads,
            dynamic_heads=counters.dynamic_heads,
            selected_chunks=counters.selected,
            hit_rate=counters.hit_rate,
            moved_bytes=moved,
            prefetched_bytes=counters.prefetched_bytes,
            ingest_s=self.ingest_s,
            ttft_s=decoded.first_token_at - started,
            tpot_ms=later / (count - 1) if count > 1 else None,
        )
        text = self._tokenizer.decode(decoded.token_ids, skip_special_tokens=True)
        return Generation(text.strip(), decoded.token_ids, stats, counters.trace)

    def new_tokens(self, options: dict[str, Any]) -> int:
        """`max_new_tokens` of a question with these generation options."""
        configs = (options.get("generation_config"), self.model.generation_config)
        stated = (options.get("max_new_tokens"), *(getattr(config, "max_new_tokens", None) for config in configs))
        return next((value for value in stated if value is not None), DEFAULT_NEW_TOKENS)

    # ---- prompt

    def _template(self, prompt: str) -> tuple[str, str]:
        """The chat template's text before the video's placeholder and after it."""
        token = self.family.video_token(self.processor)
        if token in prompt:
            raise PromptError(f"the prompt contains {token!r}, which stands for the video: leave it out.")
        messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": prompt}]}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        head, found, tail = text.partition(token)
        if not found:
            raise UnsupportedModelError("the processor's chat template writes no placeholder for the video.")
        return head, tail

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer

    def _tokenize(self, text: str) -> torch.Tensor:
        return self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def head_tokens(self) -> int:
        """Prompt tokens before the first visual token."""
        return self._head_ids.shape[1]

    # ---- end

    def _check_open(self) -> None:
        if self._closed:
            raise TieredKVError("this session is closed: open another.")

    def _drop_cache(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def close(self) -> None:
        """Free both tiers. Twice is fine; anything else afterwards raises."""
        self._drop_cache()
        self._closed = True

    def __enter__(self) -> VideoSession:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_prompt(prompt: Any) -> None:
    """Raise `PromptError` unless `prompt` is text with something in it."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError("the prompt is empty: ask something.")


def _spans(first: int, size: int, total: int) -> list[tuple[int, int]]:
    """Cut 0..total into calls of at most `size`, the last of them full: its rows are the ones that are scored."""
    ends = [total, *range(first, 0, -size), 0]
    ends = sorted(set(ends))
    return list(itertools.pairwise(ends))


def model_shape(config: Any, dtype: torch.dtype) -> sizes.KVShape:
    """What the planner must know, from a transformers config."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return sizes.KVShape(
        num_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=text.num_key_value_heads or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        itemsize=dtype.itemsize,
    )
