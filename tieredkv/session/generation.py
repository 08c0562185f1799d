"""The decoding loop: transformers' own generation settings, logits processors, stopping criteria and streamers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from tieredkv.errors import OptionError
from tieredkv.session.generation_settings import FORMS, check_options, explicit, new_tokens, setting
from tieredkv.session.generation_values import as_fractions, check_values
from tieredkv.session.results import FinishReason

__all__ = ["Decoded", "check_options", "ending_on_error", "new_tokens", "resolve_stop_strings", "run", "timed"]


@dataclass(slots=True)
class Decoded:
    """The tokens of an answer, and when they were chosen."""

    token_ids: list[int]
    first_token_at: float
    """`time.perf_counter()` when the first token was chosen."""
    last_token_at: float
    finish_reason: FinishReason


@contextmanager
def ending_on_error(streamer: Any) -> Iterator[None]:
    """End a streamer, if there is one, when the block raises; otherwise its reader would wait forever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


def run(
    model: Any,
    prompt_ids: torch.Tensor,
    first_logits: torch.Tensor,
    step: Callable[[int], torch.Tensor],
    max_new_tokens: int,
    options: dict[str, Any],
    tokenizer: Any,
) -> Decoded:
    """Generate up to `max_new_tokens` after a prompt that is already cached.

    prompt_ids `(1, N)`: what penalties and stopping criteria see. first_logits `(1, vocabulary)`: for the first
    token. step(token) caches the token and returns the logits for the next. options: transformers' names, and `seed`.
    """
    decoded: Decoded | None = None
    started = False

    def loop(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        nonlocal decoded, started
        started = True
        if streamer is not None:
            streamer.put(input_ids.cpu())
        ids, logits = input_ids, first_logits
        going_on = torch.zeros(1, dtype=torch.bool, device=input_ids.device)
        new: list[int] = []
        first_at = 0.0
        while True:
            try:
                scores = logits_processor(ids, logits)
            except _REFUSALS as error:
                if options.get("logits_processor") or options.get("prefix_allowed_tokens_fn"):
                    raise  # raised by the caller's own function
                raise _not_valid(error) from None
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1, generator=chance)
            else:
                token = scores.argmax(-1, keepdim=True)
            new.append(int(token))
            if len(new) == 1:
                first_at = time.perf_counter()
            ids = torch.cat((ids, token), dim=-1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            met = [(criterion, criterion(ids, None)) for criterion in stopping_criteria]  # each only once
            ended = reduce(or_, (done for _, done in met), going_on)  # one wait for the device
            if bool(ended.all()) or len(new) >= max_new_tokens:
                break
            logits = step(new[-1])
        if streamer is not None:
            streamer.end()
        own = [done for criterion, done in met if not isinstance(criterion, MaxLengthCriteria | MaxTimeCriteria)]
        finish: FinishReason = "stop" if bool(reduce(or_, own, going_on).all()) else "length"
        decoded = Decoded(new, first_at, time.perf_counter(), finish)
        return ids

    streamer = options.get("streamer")
    chance = _chance(options.get("seed"), first_logits.device)
    given = _for_generate(options, tokenizer, model.generation_config)
    try:
        # With positions and a mask, `generate` neither computes them nor stores any on the model.
        model.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            position_ids=torch.zeros_like(prompt_ids),
            max_new_tokens=max_new_tokens,
            custom_generate=loop,
            **given,
        )
    except _REFUSALS as error:
        if started:
            raise
        raise _not_valid(error) from None
    assert decoded is not None
    return decoded


_REFUSALS = (ValueError, TypeError, AttributeError, LookupError, NotImplementedError)
"""What transformers raises for settings of the wrong kind."""


def _chance(seed: int | None, device: torch.device) -> torch.Generator | None:
    """What tokens are drawn with: torch's own generator, or one of this answer alone, which changes no other's."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)


def _not_valid(error: Exception) -> OptionError:
    message = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return OptionError(f"a generation option is not valid: {message}")


def timed(options: dict[str, Any], model_config: Any) -> dict[str, Any]:
    """The options with `max_time` counted from now; transformers counts from the first token."""
    most = setting("max_time", options, model_config)
    if most is None:
        return options
    if not isinstance(most, int | float):
        raise OptionError(f"max_time={most!r} is not valid: give seconds.")
    criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
    criteria.append(MaxTimeCriteria(max_time=most))
    return {**options, "max_time": None, "stopping_criteria": criteria}


def _for_generate(options: dict[str, Any], tokenizer: Any, model_config: Any) -> dict[str, Any]:
    """The options as arguments of `model.generate`, without `max_new_tokens`.

    Settings are passed by name: transformers deprecates them next to a `generation_config`, and reads None in a config
    as "use the model's own value".
    """
    criteria = dict(options)
    resolve_stop_strings(criteria, options.get("tokenizer") or tokenizer, model_config)
    stopping = StoppingCriteriaList(criteria.get("stopping_criteria") or [])
    here = vars(GenerationConfig()).keys()
    forms = {name: plain[0] for name, plain in FORMS.items() if name in here}
    # `generate` drops the tokenizer if it is given a loop, and must not allocate a cache of its own.
    ours = {"stop_strings": None, "use_cache": False}
    given = {name: value for name, value in explicit(options).items() if name != "max_new_tokens"}
    callables = {name: options.get(name) for name in ("logits_processor", "prefix_allowed_tokens_fn")}
    return {**as_fractions(given), **forms, **ours, **callables, "stopping_criteria": stopping}


def resolve_stop_strings(options: dict[str, Any], tokenizer: Any, model_config: Any = None) -> None:
    """Replace `stop_strings` (from the options, their config or the model's) by a stopping criterion, in place."""
    strings = setting("stop_strings", options, model_config)
    options.pop("stop_strings", None)
    if not strings:
        return
    check_values({"stop_strings": strings})
    if options.get("generation_config") is not None:
        options["generation_config"] = copy.copy(options["generation_config"])
        options["generation_config"].stop_strings = None
    criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
    try:
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    except (*_REFUSALS, AssertionError):  # transformers cannot search every vocabulary
        criteria.append(_StopInText(tokenizer, [strings] if isinstance(strings, str) else strings))
    options["stopping_criteria"] = criteria


class _StopInText(StoppingCriteria):
    """Searches the text of an answer for stop strings: for one answer, whose first step it must see."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        self._begin: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._begin is None:
            self._begin = input_ids.shape[1] - 1
        text = self._tokenizer.decode(input_ids[0, self._begin :], skip_special_tokens=True)
        found = any(string in text for string in self._strings)
        return torch.full((input_ids.shape[0],), found, dtype=torch.bool, device=input_ids.device)
