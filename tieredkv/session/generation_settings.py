"""transformers' generation settings: which work here, which are refused by name, and which take precedence.

They come from three places, as in `model.generate`: an option takes precedence over the caller's `generation_config`,
and that over the model's own.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any

from tieredkv.errors import OptionError
from tieredkv.session.generation_values import check_values
from tieredkv.video.sampling import Sampling

if TYPE_CHECKING:
    from transformers import GenerationConfig

DEFAULT_NEW_TOKENS = 256
"""`max_new_tokens` if neither the caller nor a generation config sets it."""

_RUN_OPTIONS = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "streamer",
    "prefix_allowed_tokens_fn",
    "tokenizer",
    "seed",
)
"""Supported options that are not part of a config: those of `generate`, and `seed`, which is ours."""
_OTHER_LOOPS = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "synced_gpus",
)
"""Options of `generate` outside a config that select another decoding loop: refused unless None or False."""

WORKS = frozenset((
    "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample", "temperature",
    "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "watermarking_config", "eos_token_id"
))  # fmt: skip
"""Settings with the same effect as in `model.generate`, most of them by transformers' own processors and criteria."""
IDLE = frozenset((
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "early_stopping", "length_penalty",
    "diversity_penalty", "low_memory", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "disable_compile", "transformers_version"
))  # fmt: skip
"""Settings without effect for one sequence, one beam and no second model, in `model.generate` too."""
SEARCHES: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "guidance_scale": (None, 1),
    "token_healing": (False,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (False,),
    "is_assistant": (False,),
}
"""Settings that select another search, with the values that do not. Any other value is refused, also in the model's
own config."""
FORMS: dict[str, tuple[Any, ...]] = {
    "max_length": (None,),
    "use_cache": (True,),
    "cache_implementation": (None,),
    "cache_config": (None,),
    "max_cache_len": (None,),
    "prefill_chunk_size": (None,),
    "compile_config": (None,),
    "continuous_batching_config": (None,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "return_dict_in_generate": (False,),
}
"""Settings of the cache or the form of output, with the values that match what happens here. Any other value is
refused if the caller gives it, and ignored in the model's own config, because it changes no token."""


def check_options(options: dict[str, Any], also: tuple[str, ...] = (), model_config: Any = None) -> None:
    """Raise `OptionError` for a generation option that transformers does not know or that is not supported here.

    Checks a `generation_config` among the options too, and the model's own if it is given.
    """
    check_values(options)
    fields = _fields()
    known = {*fields, *_RUN_OPTIONS, *_OTHER_LOOPS, *also}
    for name in options:
        if name not in known:
            if name in _opening():
                raise OptionError(
                    f"{name!r} holds for all questions about a video: give it to open_session or generate, not to ask "
                    "or chat."
                )
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean {close[0]}?" if close else " Generation options have transformers' names."
            raise OptionError(f"{name!r} is not an option.{hint}")
    config = options.get("generation_config")
    if config is not None and not isinstance(config, _config_class()):
        raise OptionError(f"generation_config is a {type(config).__name__}: give a transformers GenerationConfig.")
    for name in _OTHER_LOOPS:
        if (value := options.get(name)) is not None and value is not False:
            raise OptionError(f"{name} is not supported (got a {type(value).__name__}): leave it out.")
    given = explicit(options)
    check_values(given)
    for name in sorted(fields - WORKS - IDLE):
        plain = {**SEARCHES, **FORMS}.get(name, (None, False))  # a setting of a later transformers
        value = given.get(name)
        if value is not None and not _is_plain(value, plain):
            raise OptionError(f"{name}={value!r} is not supported: leave it out, or set it to {plain[0]!r}.")
        own = getattr(model_config, name, None)
        if name not in given and name not in FORMS and own is not None and not _is_plain(own, plain):
            raise OptionError(
                f"{name}={own!r}, of the model's generation config, is not supported: give {name}={plain[0]!r}."
            )
    if "max_new_tokens" not in given:
        check_values({"max_new_tokens": getattr(model_config, "max_new_tokens", None)})


def _opening() -> set[str]:
    """Options of `open_session` that are none of a question."""
    from tieredkv.config import FIELDS

    return {
        *FIELDS,
        *(field.name for field in dataclasses.fields(Sampling)),
        "positions",
        "processor",
        "system",
        "tiers",
    }


def _config_class() -> type[GenerationConfig]:
    """Imported when first needed: with it comes torch, and `check_values` must not wait for that."""
    from transformers import GenerationConfig

    return GenerationConfig


def _fields() -> set[str]:
    """Names of the settings in the installed transformers' generation configs."""
    return {name for name in vars(_config_class()()) if not name.startswith("_")}


def _is_plain(value: Any, plain: tuple[Any, ...]) -> bool:
    """Whether a setting's value is one of these; a tensor never is."""
    return any(value is one or (isinstance(value, int | float) and value == one) for one in plain)


def explicit(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that the caller gives, by name: options over those of a `generation_config`."""
    fields, config = _fields(), options.get("generation_config")
    given = {name: getattr(config, name) for name in fields if getattr(config, name, None) is not None}
    return given | {name: value for name, value in options.items() if name in fields}


def setting(name: str, options: dict[str, Any], model_config: Any) -> Any:
    """The value of a setting: the caller's, or if that does not set it the model's own."""
    given = explicit(options)
    return given[name] if name in given else getattr(model_config, name, None)


def new_tokens(options: dict[str, Any], model_config: Any, prompt_tokens: int = 0) -> int:
    """Maximum number of tokens of an answer. prompt_tokens: known tokens of its prompt.

    Raises `OptionError` if the prompt alone reaches the `max_length` of the model's config.
    """
    stated = setting("max_new_tokens", options, model_config)
    if stated is None:
        stated = getattr(model_config, "max_new_tokens", None)
    if stated is not None:
        return int(stated)
    most = getattr(model_config, "max_length", None)
    if most is None:
        return DEFAULT_NEW_TOKENS
    if not isinstance(most, int) or prompt_tokens >= most:
        raise OptionError(
            f"max_length={most!r}, of the model's generation config, leaves no room for an answer after a prompt of "
            f"{prompt_tokens:,} tokens: give max_new_tokens."
        )
    return min(DEFAULT_NEW_TOKENS, most - prompt_tokens)
