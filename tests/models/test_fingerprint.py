"""Equal models have equal fingerprints; a change that matters to a session is noticed and named."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tieredkv.errors import SessionError, UnsupportedModelError
from tieredkv.models.fingerprint import fingerprint_difference, model_fingerprint, model_state, state_difference
from tieredkv.models.same_model import SameModel
from tieredkv.models.settings import model_settings, processor_settings, settings_difference
from tieredkv.models.switch import use_attention
from tieredkv.models.weights import plain_tensors
from tieredkv.tiny import model as tiny

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return tiny.load()


@pytest.fixture(scope="module")
def prints(bundled: tuple[Any, Any]) -> dict[str, str]:
    return model_fingerprint(bundled[0])


@pytest.fixture
def model(bundled: tuple[Any, Any]) -> Any:
    """A copy that a test may change."""
    return copy.deepcopy(bundled[0])


def _weight(model: Any) -> torch.Tensor:
    return model.state_dict()["model.language_model.layers.2.self_attn.k_proj.weight"]


# The model


def test_the_same_model_loaded_from_another_folder_is_equal(
    bundled: tuple[Any, Any], prints: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(tiny.PATH, tmp_path / "elsewhere")
    model, processor = tiny.load(path=tmp_path / "elsewhere")
    assert model_fingerprint(model) == prints
    assert fingerprint_difference(prints, model_fingerprint(model)) is None
    assert settings_difference(processor_settings(bundled[1]), processor_settings(processor)) is None


def test_the_number_of_threads_does_not_count(model: Any, prints: dict[str, str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert model_fingerprint(model) == prints
    finally:
        torch.set_num_threads(threads)


def test_the_attention_in_use_does_not_count(model: Any, prints: dict[str, str]) -> None:
    with use_attention(model):
        assert model_fingerprint(model) == prints
    model.set_attn_implementation("eager")
    assert model_fingerprint(model) == prints


def _one_ulp(weight: torch.Tensor) -> None:
    weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))


def _sign(weight: torch.Tensor) -> None:
    weight[3, 5] *= -1


def _swap_rows(weight: torch.Tensor) -> None:
    weight[[1, 6]] = weight[[6, 1]]


def _swap_columns(weight: torch.Tensor) -> None:
    weight[:, [0, 1]] = weight[:, [1, 0]]


def _swap_heads(weight: torch.Tensor) -> None:
    weight.copy_(weight.view(4, 32, -1)[[1, 0, 2, 3]].reshape(weight.shape))


@pytest.mark.parametrize("change", [_one_ulp, _sign, _swap_rows, _swap_columns, _swap_heads])
def test_changed_weights_are_noticed(
    model: Any, prints: dict[str, str], change: Callable[[torch.Tensor], None]
) -> None:
    change(_weight(model))
    now = model_fingerprint(model)
    assert now["config"] == prints["config"]
    assert fingerprint_difference(prints, now) == "the model's weights differ"


def test_any_changed_bit_and_any_swap_is_noticed() -> None:
    """A model of one weight: many rows for the sums, and some bytes that fill no row."""

    class One(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("weight", weight)
            self.config, self.dtype = tiny.build_config(), weight.dtype

    generator = torch.Generator().manual_seed(0)
    row = 8 * 4096
    count = 9 * row + 13
    weight = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    model = One(weight)
    first = model_fingerprint(model)
    for place in [0, 7, 8, row - 1, row, 5 * row + 77, 9 * row - 1, 9 * row, count - 1]:
        for bit in (1, 128):
            weight[place] ^= bit
            assert model_fingerprint(model) != first
            weight[place] ^= bit
        for step in (1, 8, row, 3 * row, 4 * row + 8):  # within a word, a row, a column, and neither
            pair = [place, (place + step) % count]
            if weight[pair[0]] != weight[pair[1]]:
                weight[pair] = weight[pair[::-1]]
                assert model_fingerprint(model) != first
                weight[pair] = weight[pair[::-1]]
    assert model_fingerprint(model) == first
    model.weight = torch.cat([weight[:1], weight])[1:]  # starts at an odd byte
    assert model_fingerprint(model) == first


def test_another_dtype_changes_both_hashes(model: Any, prints: dict[str, str]) -> None:
    now = model_fingerprint(model.to(torch.bfloat16))
    assert fingerprint_difference(prints, now) == "the model's configuration and weights differ"


def test_a_changed_configuration_is_noticed_and_named(model: Any, prints: dict[str, str]) -> None:
    before = model_settings(model)
    model.config.text_config.rope_parameters = {**model.config.text_config.rope_parameters, "rope_theta": 5e5}
    now = model_fingerprint(model)
    assert now["weights"] == prints["weights"]
    assert fingerprint_difference(prints, now) == "the model's configuration differs"
    named = settings_difference(before, model_settings(model))
    assert named == "text.rope_parameters.rope_theta was 1000000.0, is 500000.0"


def test_fields_that_change_no_key_or_value_do_not_count(model: Any, prints: dict[str, str]) -> None:
    model.config.transformers_version = "5.17.0"
    model.config._name_or_path = "/elsewhere"
    model.config.added_by_a_later_release = 3
    model.config.text_config.use_cache = False
    model.config.text_config.head_dim = None
    assert model_fingerprint(model) == prints


def test_weights_that_are_not_loaded_are_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        model_fingerprint(model.to("meta"))


# State outside weights and settings


def _state_difference(before: dict[str, Any], model: Any) -> str | None:
    return state_difference(json.loads(json.dumps(before)), model_state(model))


def test_changed_frequencies_are_noticed_but_differences_between_devices_are_not(model: Any) -> None:
    before = model_state(model)
    rotary = model.model.language_model.rotary_emb
    assert "model.language_model.rotary_emb.inv_freq" in before["buffers"]
    rotary.inv_freq[3] *= 1 + 1e-6
    assert _state_difference(before, model) is None
    rotary.inv_freq[3] *= 2
    assert _state_difference(before, model) == "the model's buffer model.language_model.rotary_emb.inv_freq differs"


def test_frequencies_rounded_with_the_model_are_noticed(model: Any) -> None:
    before = model_state(model)
    model.to(torch.bfloat16).to(torch.float32)
    assert "inv_freq differs" in str(_state_difference(before, model))


def test_frequencies_that_a_forward_pass_changes_are_left_out(model: Any) -> None:
    rotary = model.model.language_model.rotary_emb
    rotary.rope_type = "dynamic"
    before = model_state(model)
    rotary.inv_freq *= 2
    assert _state_difference(before, model) is None


def test_another_quantisation_is_named(model: Any) -> None:
    model.config.quantization_config = {"quant_method": "bitsandbytes", "llm_int8_threshold": 6.0}
    before = model_state(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "llm_int8_threshold": 0.0}
    assert _state_difference(before, model) == "quantization_config.llm_int8_threshold was 6.0, is 0.0"


NUMBERS = {
    "scale of attention": ("model.language_model.layers.1.self_attn", "scaling", 0.3),
    "epsilon": ("model.language_model.norm", "variance_epsilon", 1e-3),
    "scale of rotations": ("model.language_model.rotary_emb", "attention_scaling", 1.5),
    "scale in the vision tower": ("model.visual.blocks.0.attn", "scaling", 0.3),
    "epsilon of a module of torch": ("model.visual.blocks.0.norm1", "eps", 1e-3),
    "causality": ("model.language_model.layers.0.self_attn", "is_causal", False),
    "not a number": ("model.language_model.norm", "variance_epsilon", float("nan")),
}


@pytest.mark.parametrize(("path", "name", "value"), NUMBERS.values(), ids=NUMBERS)
def test_a_changed_number_is_named_and_noticed_by_an_open_session(
    model: Any, path: str, name: str, value: float
) -> None:
    module = model.get_submodule(path)
    if not hasattr(module, name):
        module.__dict__[name] = 1e-6  # as in other families' norms
    before, opened = model_state(model), SameModel(model)
    opened.check()
    setattr(module, name, value)
    message = f"{name} was {json.dumps(before['numbers'][re.sub('[.][0-9]+[.]', '.*.', f'{path}.{name}')])}, is "
    assert message in str(_state_difference(before, model))
    assert state_difference(model_state(model), model_state(model)) is None
    with pytest.raises(SessionError, match="this session was opened with another model"):
        opened.check()


def test_using_a_model_changes_no_number(model: Any, tmp_path: Path) -> None:
    before = model_state(model)
    ids = torch.tensor([[1, 2, 3]])
    with use_attention(model):
        assert model_state(model) == before
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        model.train()(input_ids=ids)
        assert model_state(model) == before
        model.eval().generate(input_ids=ids, max_new_tokens=2)
        assert model_state(model) == before
    model.compile()
    model.model.language_model.gradient_checkpointing = True
    assert model_state(model) == before
    model._compiled_call_impl = None
    model.save_pretrained(tmp_path / "saved")
    assert _state_difference(before, type(model).from_pretrained(tmp_path / "saved")) is None


def test_numbers_take_little_space_for_any_number_of_layers() -> None:
    from tieredkv.models.module_values import numbers

    def size(layers: int) -> int:
        model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.LayerNorm(4)) for _ in range(layers)))
        return len(json.dumps(numbers(model)))

    assert size(36) < size(2) + 20


def test_numbers_do_not_count_if_an_older_file_has_none(model: Any) -> None:
    before = model_state(model)
    del before["numbers"], before["adapter_settings"]
    model.model.language_model.layers[1].self_attn.scaling = 0.3
    assert _state_difference(before, model) is None


def test_frequencies_edited_in_place_are_noticed_by_an_open_session(model: Any) -> None:
    opened = SameModel(model)
    model.model.language_model.rotary_emb.inv_freq[3] *= 2
    with pytest.raises(SessionError, match=r"rotary_emb\.inv_freq differs"):
        opened.check()


def test_added_fields_are_named_but_not_hashed(model: Any, prints: dict[str, str]) -> None:
    model.config.vision_config.layer_norm_eps, model.config.text_config.hidden_activation = 1e-6, "gelu"
    before = model_settings(model)
    assert model_fingerprint(model)["config"] == prints["config"]
    model.config.vision_config.layer_norm_eps, model.config.text_config.hidden_activation = 1e-3, "silu"
    named = settings_difference(before, model_settings(model))
    assert named == 'text.hidden_activation was "gelu", is "silu", vision.layer_norm_eps was 1e-06, is 0.001'


# Quantised weights


def test_weights_of_torchao_are_summed_as_they_are_stored(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
    weight = model.model.language_model.layers[1].self_attn.k_proj.weight
    first = model_fingerprint(model)
    assert model_fingerprint(model) == first
    for part in weight.__tensor_flatten__()[0]:
        octets = getattr(weight, part).view(torch.uint8).view(-1)
        octets[1] ^= 1
        assert model_fingerprint(model) != first, part
        octets[1] ^= 1
    assert model_fingerprint(model) == first


def test_the_context_of_a_wrapped_weight_counts_but_addresses_in_it_do_not() -> None:
    """Block sizes and types decide what the numbers mean; functions have other addresses in each process."""

    class Wrapped(torch.Tensor):
        context: Any = None

        def __tensor_flatten__(self) -> tuple[list[str], Any]:
            return ["inner"], self.context

        inner = torch.ones(3)

    def descriptions(context: Any) -> list[str]:
        tensor = torch.ones(3).as_subclass(Wrapped)
        tensor.context = context
        return [description for description, _ in plain_tensors(tensor, "w")]

    assert descriptions({"block": 8, "of": object()}) == descriptions({"block": 8, "of": object()})
    assert descriptions({"block": 8}) != descriptions({"block": 16})


def test_entries_of_a_state_dict_that_are_not_tensors_count_too() -> None:
    class Extra(torch.nn.Module):
        state: Any = b"one"
        config, dtype = tiny.build_config(), torch.float32

        def get_extra_state(self) -> Any:
            return self.state

    model = Extra()
    first = model_fingerprint(model)
    assert model_fingerprint(model) == first
    for other in (b"two", {"a": 1}, None):
        model.state = other
        assert model_fingerprint(model) != first
