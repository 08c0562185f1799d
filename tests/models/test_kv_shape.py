"""Sizes of a model's keys and values, from its config."""

from __future__ import annotations

import pytest
import torch
from helpers import text_config

from tieredkv import TieredCache, plan
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.kv_shape import DTYPES, model_shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_follow_the_dtype(dtype):
    shape = model_shape(text_config("llama"), dtype)
    assert shape.itemsize == dtype.itemsize
    assert shape.token_bytes == shape.kv_heads * 2 * shape.head_dim * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_other_dtypes_are_refused_in_one_sentence(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        UnsupportedModelError, match=rf"of {name} are not supported: load the model in bfloat16, float16, float32"
    ):
        model_shape(text_config("llama"), dtype)


def test_a_cache_and_a_plan_refuse_a_model_in_float64():
    config = text_config("llama")
    with TieredCache(config, gpu_kv_gb=1) as cache, pytest.raises(UnsupportedModelError, match="float64"):
        keys = torch.zeros((1, config.num_key_value_heads, 3, 16), dtype=torch.float64)
        cache.update(keys, keys, 0)
    config.dtype = torch.float64
    with pytest.raises(UnsupportedModelError, match="float64"):
        plan(config, 1000)
