"""What a quantised weight takes, by the checkpoint's config alone: no quantisation library is imported.

n weights in r rows of c. Formulas are those of the libraries' storage; scales and zero points are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tieredkv.errors import UnsupportedModelError, first_line
from tieredkv.memory.units import FLOAT16, FLOAT32, INT32, ceil_div

BNB_BLOCK, BNB_NESTED = 64, 256
"""bitsandbytes: weights per scale in 4 bits, and scales per scale of scales (double quantisation)."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one checkpoint is quantised."""

    name: str
    """For the plan."""
    matrix_bytes: Callable[[int, int], int] | None
    """Bytes of a matrix of r rows and c columns; None: not known, so that it is counted unquantised."""
    keep: tuple[str, ...] | None = None
    """Modules that the config says are not quantised, as transformers matches names; None: it says nothing."""
    keep_head: bool = False
    """Whether the output layer stays as it is even if the config lists modules."""
    experts: bool = False
    """Whether experts are quantised that are parameters of their own, and not linear layers."""
    layers_only: bool = False
    """Whether only the decoder's layers are quantised."""


def scheme_of(config: Any) -> Scheme | None:
    """That of a transformers config; None if the checkpoint is not quantised. Raises `UnsupportedModelError` for
    settings that are damaged."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    try:
        scheme = _scheme(given if isinstance(given, Mapping) else given.to_dict())
        if scheme.matrix_bytes is not None:
            scheme.matrix_bytes(128, 128)
        for pattern in scheme.keep or ():
            re.compile(pattern.removeprefix("re:"))
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise UnsupportedModelError(
            f"the model's config is damaged: its quantization_config cannot be read ({first_line(error)})."
        ) from None
    return scheme


def _scheme(settings: Mapping[str, Any]) -> Scheme:
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "")
    method = str(getattr(method, "value", method))
    if method.startswith("bitsandbytes"):  # with a suffix in old files
        return _bitsandbytes(settings)
    makers = {
        "fp8": _fp8,
        "gptq": _gptq,
        "awq": _awq,
        "torchao": _torchao,
        "compressed-tensors": _compressed,
    }
    return makers[method](settings) if method in makers else Scheme(method or "quantised", None)


def _keep(settings: Mapping[str, Any], name: str = "modules_to_not_convert") -> tuple[str, ...] | None:
    names = settings.get(name)
    if isinstance(names, str):
        raise TypeError(f"{name} is text")
    return None if names is None else tuple(names)


def _bitsandbytes(settings: Mapping[str, Any]) -> Scheme:
    keep = _keep(settings, "llm_int8_skip_modules")
    if not (settings.get("load_in_4bit") or settings.get("_load_in_4bit")):
        return Scheme("bitsandbytes, 8 bits", lambda r, c: r * c + r * FLOAT32, keep)
    nested = bool(settings.get("bnb_4bit_use_double_quant"))

    def four(r: int, c: int) -> int:
        blocks, table = ceil_div(r * c, BNB_BLOCK), 16 * FLOAT32
        if not nested:
            return ceil_div(r * c, 2) + blocks * FLOAT32 + table
        return ceil_div(r * c, 2) + blocks + (ceil_div(blocks, BNB_NESTED) + 256 + 1) * FLOAT32 + table

    return Scheme("bitsandbytes, 4 bits" + (", double quantisation" if nested else ""), four, keep)


def _fp8(settings: Mapping[str, Any]) -> Scheme:
    if settings.get("dequantize"):
        return Scheme("FP8, dequantised when loaded", None)
    block = settings.get("weight_block_size")
    scale = 1 if settings.get("scale_fmt") == "ue8m0" else FLOAT32
    static = FLOAT32 if settings.get("activation_scheme") == "static" else 0

    def eight(r: int, c: int) -> int:
        scales = scale * ceil_div(r, block[0]) * ceil_div(c, block[1]) if block else FLOAT32
        return r * c + scales + static

    return Scheme("FP8", eight, _keep(settings), experts=settings.get("expert_dtype", "fp8") == "fp8")


def _grouped(bits: int, group: int, zeros: bool, index: bool) -> Callable[[int, int], int]:
    """`bits` a weight; for each group of a row a float16 scale and, with `zeros`, a zero point.

    index: with the group of each column, int32.
    """

    def size(r: int, c: int) -> int:
        groups = r * (ceil_div(c, group) if group > 0 else 1)
        return ceil_div((r * c + (groups if zeros else 0)) * bits, 8) + groups * FLOAT16 + (c * INT32 if index else 0)

    return size


def _gptq(settings: Mapping[str, Any]) -> Scheme:
    bits, group = settings["bits"], settings.get("group_size", 128)
    return Scheme(f"GPTQ, {bits} bits", _grouped(bits, group, zeros=True, index=True), _gptq_keep(settings), True,
                  layers_only=True)  # fmt: skip


def _gptq_keep(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """GPT-QModel's files name what is left out as patterns that begin with "-:"."""
    dynamic = settings.get("dynamic") or {}
    return (*(_keep(settings) or ()), *(name[2:] for name in dynamic if name.startswith("-:")))


def _awq(settings: Mapping[str, Any]) -> Scheme:
    bits, group = settings["bits"], settings.get("group_size", 128)
    zeros = settings.get("zero_point", True)
    return Scheme(f"AWQ, {bits} bits", _grouped(bits, group, zeros, index=False), _keep(settings), True)


def _torchao(settings: Mapping[str, Any]) -> Scheme:
    given = settings.get("quant_type")
    kind = given.get("default", given) if isinstance(given, Mapping) else given
    name = kind.get("_type", "") if isinstance(kind, Mapping) else str(kind or "")
    data = kind.get("_data", {}) if isinstance(kind, Mapping) else {}
    plain, group = name.lower().replace("_", ""), data.get("group_size")
    size: Callable[[int, int], int] | None = None
    if "int4" in plain:

        def size(r: int, c: int) -> int:  # scale and zero point in the model's 16 bits
            return ceil_div(r * c, 2) + r * ceil_div(c, group or 128) * 2 * FLOAT16

    elif "int8" in plain:

        def size(r: int, c: int) -> int:
            return r * c + r * (ceil_div(c, group) if group else 1) * (FLOAT32 + 1)

    elif "float8" in plain:
        per_row = (data.get("granularity") or {}).get("_type") != "PerTensor"

        def size(r: int, c: int) -> int:
            return r * c + (r if per_row else 1) * FLOAT32

    return Scheme(f"torchao, {name}", size, _keep(settings))


def _compressed(settings: Mapping[str, Any]) -> Scheme:
    groups = list((settings.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") or {}) if len(groups) == 1 else {}
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if not bits or strategy not in ("tensor", "channel", "group") or settings.get("format", "").startswith("nvfp4"):
        return Scheme("compressed-tensors", None)
    zeros, group = not weights.get("symmetric", True), weights.get("group_size") or 0

    def size(r: int, c: int) -> int:
        if strategy == "tensor":
            return ceil_div(r * c * bits, 8) + FLOAT32
        return _grouped(bits, group if strategy == "group" else 0, zeros, index=False)(r, c)

    return Scheme(f"compressed-tensors, {bits} bits", size, _keep(settings, "ignore"))


def quantised_weights(model: Any, scheme: Scheme) -> Iterator[str]:
    """Names of the parameters that transformers quantises when it loads such a checkpoint. model: not quantised."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    keep = list(scheme.keep or ())
    if scheme.keep is None or scheme.keep_head:
        keep += get_keys_to_not_convert(model)
    keep += model._keep_in_fp32_modules or ()
    patterns = [name.removeprefix("re:") for name in keep]
    for name, module in model.named_modules():
        if not should_convert_module(name, patterns):
            continue
        if isinstance(module, nn.Linear):
            if not scheme.layers_only or _in_a_layer(name):
                yield f"{name}.weight"
        elif scheme.experts and name.endswith(".experts"):
            yield from (f"{name}.{part}" for part, weight in module.named_parameters() if weight.ndim == 3)


def _in_a_layer(name: str) -> bool:
    """Whether a module is in a layer of the decoder, and not of a vision tower."""
    return re.search(r"(^|\.)(language_model|text_model|model)\.layers\.\d+\.", name) is not None
