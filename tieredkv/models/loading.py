"""Loads configs, models and processors from a folder or a hub, with one clear error if that fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tieredkv.environment import forking
from tieredkv.errors import UnsupportedModelError, first_line
from tieredkv.models import families
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.wrapped import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WHAT_IS_A_MODEL = "a transformers model, a local path, or a hub id"


def load_config(source: str | Path) -> PreTrainedConfig:
    """The config of the model at a local path or hub id. Raises `UnsupportedModelError`."""
    from huggingface_hub.errors import StrictDataclassError  # a field of the wrong type
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise _unknown_type(source, error) or _nothing_at(source, error) from None


def check_config(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` unless this is a valid config of a supported video family."""
    families.video_family(config)
    model_shape(config, torch.float32)


def load(model: Any, processor: Any = None) -> tuple[Any, Any]:
    """A model and its processor. Loads the model if it is a path or hub id, and its processor if none is given.

    Loads to the current CUDA device if there is one, otherwise to the CPU. Unwraps a wrapped model. Raises
    `UnsupportedModelError` if there is no such model, its family is not supported, or no processor is found.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    forking.check()
    if isinstance(model, str | Path):
        source = str(model)
        check_config(load_config(source))
        try:
            # Directly to the card: this needs less host memory, and quantised weights cannot be moved.
            place = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
            model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto", device_map=place).eval()
        except torch.OutOfMemoryError as error:
            raise UnsupportedModelError(
                f"{source}: the weights alone do not fit on the card ({first_line(error)}): give a smaller model, or "
                "one in 4 bits."
            ) from None
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise _nothing_at(source, error) from None
        return model, load_processor(source) if processor is None else processor
    model = unwrapped(model)
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise UnsupportedModelError(f"model is a {type(model).__name__}: give {WHAT_IS_A_MODEL}.")
    check_config(model.config)
    source = getattr(model, "name_or_path", "") or ""
    return model, load_processor(source) if processor is None else processor


def load_processor(source: str | Path) -> Any:
    """The processor stored with a model. Raises `UnsupportedModelError`."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(str(source))
    except (OSError, ValueError, ImportError) as error:  # ImportError names a package that a processor needs
        reason = first_line(error).partition(". If you were trying")[0]  # the rest is about hub ids
        raise UnsupportedModelError(f"no processor found beside the model ({reason}): pass processor=.") from None


def _unknown_type(source: str | Path, error: Exception) -> UnsupportedModelError | None:
    """The error for a config of a type that the installed transformers does not know; None for any other config."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig, __version__

    if not isinstance(error, ValueError):  # a missing file is an OSError; reading it again could take a minute
        return None
    try:
        kind = PreTrainedConfig.get_config_dict(str(source))[0].get("model_type")
    except (OSError, ValueError):
        return None
    if not isinstance(kind, str) or kind in CONFIG_MAPPING:
        return None
    families.check_refused(kind)
    known = families.VIDEO_FAMILIES.get(kind) or families.find_decoder(kind)
    advice = f"install {known.tested[0]} or newer" if known else "`tieredkv models` lists those that are supported"
    return UnsupportedModelError(
        f"{source}: transformers {__version__} does not know models of type {kind!r}: {advice}."
    )


def _nothing_at(source: str | Path, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(f"{source}: no usable model found there ({first_line(error)}).")
