"""The decoding loop: transformers' own generation settings, logits processors, stopping criteria and streamers."""

from __future__ import annotations

import copy
import difflib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from tieredkv.errors import OptionError

_RUN_OPTIONS = ("generation_config", "logits_processor", "stopping_criteria", "streamer")
_SEARCHES = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "guidance_scale": None,
    "token_healing": False,
    "prompt_lookup_num_tokens": None,
}
"""Options that make another search of decoding."""
_REFUSED = {
    **_SEARCHES,
    "prefill_chunk_size": None,
    "cache_implementation": None,
    "use_cache": True,
    "max_length": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
}
"""Options of transformers without effect or of another meaning here; only the plain value given is accepted."""


@dataclass(slots=True)
class Decoded:
    """What the loop made."""

    token_ids: list[int]
    first_token_at: float
    """`time.perf_counter()` when the first token was chosen."""
    last_token_at: float


def check_options(options: dict[str, Any], also: tuple[str, ...] = (), model_config: Any = None) -> None:
    """Raise `OptionError` for a generation option that transformers does not know or that is not supported here.

    A `generation_config` among the options is looked into, and so is the model's own where it is given; there, what
    would only change the form of the output is let pass.
    """
    known = {name for name in {*vars(GenerationConfig()), *_RUN_OPTIONS, *also} if not name.startswith("_")}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean {close[0]}?" if close else " Generation options have transformers' names."
            raise OptionError(f"{name!r} is not an option.{hint}")
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise OptionError(f"generation_config is a {type(config).__name__}: give a transformers GenerationConfig.")
    for name, plain in _REFUSED.items():
        values = [options.get(name), getattr(config, name, None)]
        if name in _SEARCHES:
            values.append(getattr(model_config, name, None))
        for value in values:
            if value is not None and value != plain:
                raise OptionError(f"{name}={value!r} is not supported: leave it out, or set it to {plain!r}.")
    for new in (options.get("max_new_tokens"), getattr(config, "max_new_tokens", None)):
        if new is not None and (not isinstance(new, int) or isinstance(new, bool) or new < 1):
            raise OptionError(f"max_new_tokens={new!r} is not valid: give a whole number of at least 1.")


@contextmanager
def ending_on_error(streamer: Any) -> Iterator[None]:
    """End a streamer when the block raises, or whoever reads it would wait for ever. None: nothing to end."""
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
    """Generate up to `max_new_tokens` after a prompt that is cached already.

    prompt_ids `(1, N)`: what penalties and stopping criteria see. first_logits `(1, vocabulary)`: for the first
    token. step(token) caches the token and returns the logits for the next. options: transformers' names.
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
        new: list[int] = []
        first_at = 0.0
        while True:
            scores = logits_processor(ids, logits)
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1)
            else:
                token = scores.argmax(-1, keepdim=True)
            new.append(int(token))
            if len(new) == 1:
                first_at = time.perf_counter()
            ids = torch.cat((ids, token), dim=-1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if bool(stopping_criteria(ids, None).all()) or len(new) >= max_new_tokens:
                break
            logits = step(new[-1])
        if streamer is not None:
            streamer.end()
        decoded = Decoded(new, first_at, time.perf_counter())
        return ids

    # `generate` drops streamer and tokenizer when it is given a loop of one's own: both are handled here.
    given = {name: value for name, value in options.items() if name not in ("max_new_tokens", "streamer")}
    streamer = options.get("streamer")
    resolve_stop_strings(given, tokenizer, model.generation_config)
    try:
        # Positions and mask are given so that `generate` neither computes nor stores any on the model.
        model.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            position_ids=torch.zeros_like(prompt_ids),
            max_new_tokens=max_new_tokens,
            use_cache=False,  # the cache is ours: `generate` must not allocate one beside it
            custom_generate=loop,
            **given,
        )
    except (ValueError, TypeError) as error:
        if started:
            raise
        raise OptionError(f"a generation option is not valid: {str(error).strip().splitlines()[0]}") from None
    assert decoded is not None
    return decoded


def resolve_stop_strings(options: dict[str, Any], tokenizer: Any, model_config: Any = None) -> None:
    """Turn `stop_strings`, of the options, their config or the model's, into a stopping criterion; in place."""
    config = options.get("generation_config") or model_config
    strings = options.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if not strings:
        return
    if config is not None:
        options["generation_config"] = copy.copy(config)
        options["generation_config"].stop_strings = None
    criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
    try:
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    except (ValueError, IndexError) as error:  # transformers cannot search every vocabulary
        raise OptionError(f"stop_strings does not work with this tokenizer ({error}): use stopping_criteria.") from None
    options["stopping_criteria"] = criteria
