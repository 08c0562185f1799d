"""`weights="4bit"` or `"8bit"`: a checkpoint in 16 or 32 bits, quantised while it is loaded.

The vision tower, what connects it to the decoder, and the output layer keep the checkpoint's dtype. Which library does
it does not depend on the device: 4 bits are bitsandbytes' NF4, 8 bits torchao's weights in int8 with a scale a row.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tieredkv.errors import OptionError, UnsupportedModelError, check_value

if TYPE_CHECKING:
    import torch

PACKAGES = {"4bit": "bitsandbytes", "8bit": "torchao"}
"""The package that loads them."""


def check_weights(weights: str | None, loaded: bool = False) -> None:
    """Raise `OptionError` for a value that is not known, and for a model that is loaded already."""
    known = weights is None or (isinstance(weights, str) and weights in PACKAGES)
    check_value(known, "weights", weights, f"{' or '.join(map(repr, PACKAGES))}, or leave it out")
    if weights is not None and loaded:
        raise OptionError(f"weights={weights!r} is for a path or a hub id, and this model is loaded: leave it out.")


def check_package(weights: str | None) -> None:
    """Raise `OptionError` if the package that these weights need is not installed."""
    if weights is not None and find_spec(PACKAGES[weights]) is None:
        raise OptionError(
            f"weights={weights!r} needs the package {PACKAGES[weights]}: pip install 'tieredkv[quantised]'."
        )


def quantised_config(config: Any, weights: str, dtype: torch.dtype) -> Any:
    """A copy of a model's config that says how its weights will be quantised, as a saved checkpoint's would. Imports no
    quantisation library. Raises `UnsupportedModelError` if the checkpoint is quantised already."""
    import copy

    from tieredkv.models.quantised import scheme_of

    if (scheme := scheme_of(config)) is not None:
        raise UnsupportedModelError(
            f"the checkpoint is quantised already ({scheme.name}): leave out weights={weights!r}."
        )
    keep = kept_modules(config, dtype)
    config = copy.deepcopy(config)
    if weights == "4bit":
        settings = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "llm_int8_skip_modules": keep,
        }
    else:
        kind = {"_type": "Int8WeightOnlyConfig", "_data": {}}
        settings = {"quant_method": "torchao", "quant_type": {"default": kind}, "modules_to_not_convert": keep}
    config.quantization_config = settings
    return config


def transformers_config(config: Any, weights: str, dtype: torch.dtype) -> Any:
    """The `quantization_config` for transformers' `from_pretrained`. The package must be installed."""
    settings = quantised_config(config, weights, dtype).quantization_config
    if weights == "4bit":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings["bnb_4bit_quant_type"],
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=settings["llm_int8_skip_modules"],
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=settings["modules_to_not_convert"])


def keep_stored_form(model: Any) -> None:
    """Keep bitsandbytes from storing weights otherwise at their first use, as it does on CPUs with AVX512-BF16: a saved
    session is known by the weights as they are stored."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def kept_modules(config: Any, dtype: torch.dtype) -> list[str]:
    """Full names of the modules that keep their dtype: everything of pictures, and the output layer.

    Full names, because transformers matches shorter ones only at the beginning or the end of a module's name.
    """
    from tieredkv.models.families import VIDEO_FAMILIES
    from tieredkv.models.meta import on_meta

    model = on_meta(config, dtype)
    family = VIDEO_FAMILIES.get(config.model_type)
    vision = frozenset() if family is None else family.vision_modules
    output = model.get_output_embeddings()
    kept: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in kept)
        if not inside and (module is output or name.rpartition(".")[2] in vision):
            kept.append(name)
    return kept
