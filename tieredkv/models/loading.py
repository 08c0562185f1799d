"""Loads configs, models and processors from a folder or a hub, with one clear error if that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tieredkv.environment import forking
from tieredkv.errors import UnsupportedModelError, first_line
from tieredkv.models import families
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.quantising import (
    check_package,
    check_weights,
    keep_stored_form,
    quantised_config,
    transformers_config,
)
from tieredkv.models.sources import WHAT_IS_A_MODEL, check_source, is_local
from tieredkv.models.wrapped import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(source: str | Path, local: bool | None = None) -> PreTrainedConfig:
    """The config of the model at a local path or hub id. Raises `UnsupportedModelError`.

    local: what `is_local` says of the source, if that is known.
    """
    from huggingface_hub.errors import StrictDataclassError  # a field of the wrong type
    from transformers import AutoConfig

    check_source(source)
    local = is_local(source) if local is None else local
    try:
        return AutoConfig.from_pretrained(str(source), local_files_only=local)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise _unknown_type(source, error, local) or _nothing_at(source, error) from None


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of a checkpoint's weights; bfloat16 if its config states none."""
    dtype: Any = config.dtype or config.get_text_config(decoder=True).dtype or torch.bfloat16
    if isinstance(dtype, str):  # what `save_pretrained` leaves in the config of a loaded model
        dtype = getattr(torch, dtype)
    return dtype


def check_config(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` unless this is a valid config of a supported video family."""
    families.video_family(config)
    model_shape(config, torch.float32)


def load(
    model: Any,
    processor: Any = None,
    weights: str | None = None,
    check: Callable[[PreTrainedConfig], None] | None = None,
) -> tuple[Any, Any]:
    """A model and its processor. Loads the model if it is a path or hub id, and its processor if none is given.

    Loads to the current CUDA device if there is one, otherwise to the CPU. Unwraps a wrapped model. weights: "4bit" or
    "8bit" quantises while loading. check: called with the config, quantised if it will be, before weights are read or
    downloaded; may raise. Raises `UnsupportedModelError` if there is no such model, its family is not supported, or no
    processor is found, and `OptionError` for `weights` that are not possible here.
    """
    forking.check()
    if isinstance(model, str | Path):
        check_weights(weights)
        local = _local(model)
        config = load_config(model, local)
        check_config(config)
        processor = _load_processor(model, local) if processor is None else processor
        return _load(model, local, config, weights, check), processor
    check_weights(weights, loaded=True)
    model = unwrapped(model)
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise UnsupportedModelError(f"model is a {type(model).__name__}: give {WHAT_IS_A_MODEL}.")
    check_config(model.config)
    return model, load_processor(getattr(model, "name_or_path", "")) if processor is None else processor


def _local(source: str | Path) -> bool:
    check_source(source)
    return is_local(source)


def _load(
    source: str | Path,
    local: bool,
    config: PreTrainedConfig,
    weights: str | None,
    check: Callable[[PreTrainedConfig], None] | None,
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    quantised: Any = config
    options: dict[str, Any] = {}
    if weights is not None:
        dtype = stored_dtype(config)
        quantised = quantised_config(config, weights, dtype)
        check_package(weights)
        options["quantization_config"] = transformers_config(config, weights, dtype)
    if check is not None:
        check(quantised)
    try:
        # Directly to the card: this needs less host memory, and quantised weights cannot be moved.
        place = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
        model = AutoModelForImageTextToText.from_pretrained(
            str(source), dtype="auto", device_map=place, local_files_only=local, **options
        ).eval()
        keep_stored_form(model)
        return model
    except torch.OutOfMemoryError as error:
        raise UnsupportedModelError(
            f"{source}: the weights alone do not fit on the card ({first_line(error)}): give a smaller model, or "
            "weights='4bit'."
        ) from None
    except ImportError as error:  # a package that the model or its quantisation needs, named with what to do
        raise UnsupportedModelError(f"{source}: the model cannot be loaded ({first_line(error)}).") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _nothing_at(source, error) from None


def load_processor(source: str | Path | None) -> Any:
    """The processor stored with a model. Raises `UnsupportedModelError`. source: None or "" if it is not known."""
    if not source:
        raise UnsupportedModelError(
            "no processor found beside the model (it does not say where it is from): pass processor=."
        )
    return _load_processor(source, _local(source))


def _load_processor(source: str | Path, local: bool) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(str(source), local_files_only=local)
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        # ImportError names a package that a processor needs; of the others, what follows is about hub ids.
        reason = first_line(error).partition(". If you were trying")[0]
        raise UnsupportedModelError(
            f"no processor found beside the model ({reason}): copy its files (preprocessor_config.json, tokenizer.json "
            "and others) there from the model that it was made from; in Python, processor= gives another one."
        ) from None


def _unknown_type(source: str | Path, error: Exception, local: bool) -> UnsupportedModelError | None:
    """The error for a config of a type that the installed transformers does not know; None for any other config."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig, __version__

    if isinstance(error, OSError):  # a missing file; reading it again could take a minute
        return None
    try:
        kind = PreTrainedConfig.get_config_dict(str(source), local_files_only=local)[0].get("model_type")
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    if kind is not None and not isinstance(kind, str):
        return UnsupportedModelError(
            f"{source}: the model's config is damaged: model_type is {kind!r}, and must be text."
        )
    if kind is None or kind in CONFIG_MAPPING:
        return None
    families.check_refused(kind)
    known = families.VIDEO_FAMILIES.get(kind) or families.find_decoder(kind)
    advice = f"install {known.tested[0]} or newer" if known else "`tieredkv models` lists those that are supported"
    return UnsupportedModelError(
        f"{source}: transformers {__version__} does not know models of type {kind!r}: {advice}."
    )


def _nothing_at(source: str | Path, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(f"{source}: no usable model found there ({first_line(error)}).")
