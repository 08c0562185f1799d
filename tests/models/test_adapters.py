"""A session belongs to the adapters it was opened with; other adapters, scales or settings are refused by name."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from families import build

import tieredkv
from tieredkv.errors import SessionError, UnsupportedModelError

pytestmark = pytest.mark.setups

pytest.importorskip("peft", reason="peft is not installed: pip install 'tieredkv[dev]'")

QUESTION = "what is it ?"


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (6, 56, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor():
    return build("qwen2_5_vl")[1]


def config():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def fill(model) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)


@pytest.fixture
def wrapped():
    """A model with adapter a in use, and adapter b."""
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(build("qwen2_5_vl")[0]), config(), adapter_name="a")
    model.add_adapter("b", config())
    fill(model)
    return model.eval()


@pytest.fixture
def opened(wrapped, processor, film):
    with tieredkv.open_session(wrapped, film, processor=processor, fps=4, gpu_kv_gb=1) as session:
        yield session


@pytest.fixture
def saved(opened, tmp_path):
    """Saved under adapter a."""
    opened.save(tmp_path / "a.tkv")
    return tmp_path / "a.tkv"


def scaled(wrapped) -> None:
    for layer in wrapped.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("a", 3)


def scaled_in_one_layer(wrapped) -> None:
    next(layer for layer in wrapped.modules() if hasattr(layer, "set_scale")).set_scale("a", 3)


def disabled(wrapped) -> None:
    wrapped.base_model.disable_adapter_layers()


def reloaded(wrapped) -> None:
    wrapped.set_adapter("b")
    wrapped.delete_adapter("a")
    wrapped.add_adapter("a", config())
    fill(wrapped)
    wrapped.set_adapter("a")


OTHER = {
    "another adapter": (lambda wrapped: wrapped.set_adapter("b"), "under the adapter a, now the adapter b is active"),
    "both": (lambda wrapped: wrapped.base_model.set_adapter(["a", "b"]), "now the adapter a with b is active"),
    "none": (disabled, "under the adapter a, now no adapter is active"),
    "another scale": (scaled, "with the adapter a scaled by 4.0, now it is scaled by 12.0"),
    "another scale in one layer": (scaled_in_one_layer, "now it is scaled by 12.0 and 4.0"),
    "merged": (lambda wrapped: wrapped.merge_adapter(), "under the adapter a, now no adapter is active"),
    "unloaded": (lambda wrapped: wrapped.unload(), "under the adapter a, now no adapter is active"),
    "another of its name": (reloaded, "differ|with other weights in the adapter a"),
}


@pytest.mark.parametrize(("change", "message"), OTHER.values(), ids=OTHER)
def test_a_session_saved_under_an_adapter_is_refused_under_any_other(saved, wrapped, processor, change, message):
    inside = wrapped.get_base_model()
    change(wrapped)
    with pytest.raises(SessionError, match=message):
        tieredkv.load_session(saved, inside, processor=processor)


@pytest.mark.parametrize(("change", "message"), OTHER.values(), ids=OTHER)
def test_an_open_session_is_refused_under_any_other_adapter(opened, wrapped, tmp_path, change, message):
    change(wrapped)
    with pytest.raises(SessionError, match=f"this session was opened .*({message})"):
        opened.ask(QUESTION, max_new_tokens=1)
    with pytest.raises(SessionError, match="this session was opened"):
        opened.save(tmp_path / "of another.tkv")
    assert not (tmp_path / "of another.tkv").exists()


def test_a_session_continues_under_its_adapter(opened, saved, wrapped, processor):
    first = opened.ask(QUESTION, max_new_tokens=4).token_ids
    wrapped.set_adapter("b")
    with pytest.raises(SessionError):
        opened.chat(QUESTION, max_new_tokens=4)
    with wrapped.disable_adapter(), pytest.raises(SessionError):
        opened.ask(QUESTION, max_new_tokens=4)
    wrapped.set_adapter("a")
    assert opened.history == ()
    assert opened.ask(QUESTION, max_new_tokens=4).token_ids == first
    with tieredkv.load_session(saved, wrapped, processor=processor) as session:
        assert session.ask(QUESTION, max_new_tokens=4).token_ids == first


def test_an_adapter_that_is_switched_during_an_answer_is_noticed(opened, wrapped):
    def switch(ids, scores):
        wrapped.set_adapter("b")
        return scores

    with pytest.raises(SessionError, match="this session was opened under the adapter a"):
        opened.ask(QUESTION, max_new_tokens=3, logits_processor=[switch])
    wrapped.set_adapter("a")
    opened.ask(QUESTION, max_new_tokens=3)


def test_adapters_that_are_not_in_use_do_not_count(saved, wrapped, processor):
    wrapped.add_adapter("c", config())
    tieredkv.load_session(saved, wrapped, processor=processor).close()
    wrapped.delete_adapter("b")
    tieredkv.load_session(saved, wrapped, processor=processor).close()


def test_a_session_of_the_plain_model_loads_while_adapters_are_disabled(wrapped, processor, film, tmp_path):
    plain = build("qwen2_5_vl")[0]
    with tieredkv.open_session(plain, film, processor=processor, fps=4, gpu_kv_gb=1) as session:
        session.save(tmp_path / "plain.tkv")
        expected = session.ask(QUESTION, max_new_tokens=4).token_ids
    with (
        wrapped.disable_adapter(),
        tieredkv.load_session(tmp_path / "plain.tkv", wrapped, processor=processor) as session,
    ):
        assert session.ask(QUESTION, max_new_tokens=4).token_ids == expected
    with pytest.raises(SessionError, match="under no adapter, now the adapter a is active"):
        tieredkv.load_session(tmp_path / "plain.tkv", wrapped, processor=processor)


def test_a_merged_adapter_is_part_of_the_weights(wrapped, processor, film, tmp_path):
    wrapped.merge_adapter()
    with tieredkv.open_session(wrapped, film, processor=processor, fps=4, gpu_kv_gb=1) as session:
        session.save(tmp_path / "merged.tkv")
        session.ask(QUESTION, max_new_tokens=1)
    tieredkv.load_session(tmp_path / "merged.tkv", wrapped, processor=processor).close()
    wrapped.base_model.set_adapter("b")
    wrapped.unmerge_adapter()
    with pytest.raises(SessionError, match="under no adapter, now the adapter b is active"):
        tieredkv.load_session(tmp_path / "merged.tkv", wrapped, processor=processor)
    wrapped.merge_adapter()
    with pytest.raises(SessionError, match="weights differ"):
        tieredkv.load_session(tmp_path / "merged.tkv", wrapped, processor=processor)


def test_adapters_loaded_by_transformers_count_too(processor, film, tmp_path, monkeypatch):
    # transformers requires a newer PEFT than this test needs
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None, raising=False)
    model = copy.deepcopy(build("qwen2_5_vl")[0])
    model.add_adapter(config(), "a")
    model.add_adapter(config(), "b")
    fill(model)
    model.eval().set_adapter("a")
    with tieredkv.open_session(model, film, processor=processor, fps=4, gpu_kv_gb=1) as session:
        session.save(tmp_path / "a.tkv")
        model.set_adapter("b")
        for call in (
            lambda: session.ask(QUESTION, max_new_tokens=1),
            lambda: tieredkv.load_session(tmp_path / "a.tkv", model, processor=processor),
        ):
            with pytest.raises(SessionError, match="under the adapter a, now the adapter b is active"):
                call()
        model.disable_adapters()
        with pytest.raises(SessionError, match="now no adapter is active"):
            session.ask(QUESTION, max_new_tokens=1)
        model.enable_adapters()
        model.set_adapter("a")
        session.ask(QUESTION, max_new_tokens=1)


def test_a_file_from_before_adapters_were_recorded_loads_without_adapters(
    wrapped, processor, film, tmp_path, monkeypatch
):
    """Such a file has a fingerprint of all weights, including adapters, by PEFT's names."""
    from tieredkv.models.fingerprint import model_fingerprint
    from tieredkv.storage import tensor_file

    def old(path, manifest, tensors, progress):
        del manifest["model_state"]
        manifest["model"] = model_fingerprint(wrapped.get_base_model(), all_adapters=True)
        return write(path, json.loads(json.dumps(manifest)), tensors, progress)

    write = tensor_file.write
    monkeypatch.setattr(tensor_file, "write", old)
    with wrapped.disable_adapter():
        with tieredkv.open_session(wrapped, film, processor=processor, fps=4, gpu_kv_gb=1) as session:
            session.save(tmp_path / "old.tkv")
        tieredkv.load_session(tmp_path / "old.tkv", wrapped, processor=processor).close()
    with pytest.raises(SessionError, match="under no adapter, now the adapter a is active"):
        tieredkv.load_session(tmp_path / "old.tkv", wrapped, processor=processor)


# Settings of adapters outside their weights


def methods() -> dict[str, tuple]:
    """By name: a type of adapter, required settings, and a setting that changes answers but no weight."""
    import peft

    return {
        "OFT": (peft.OFTConfig, {"r": 0, "oft_block_size": 8}, {"use_cayley_neumann": False}),
        "WaveFT": (peft.WaveFTConfig, {"n_frequency": 16}, {"scaling": 3.0}),
        "SHiRA": (peft.ShiraConfig, {"r": 2}, {"random_seed": 5}),
        "FourierFT": (peft.FourierFTConfig, {"n_frequency": 16}, {"random_loc_seed": 5}),
        "VBLoRA": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 16, "vector_length": 16}, {"topk": 1}),
        "HRA": (peft.HRAConfig, {"r": 2}, {"apply_GS": True}),
        "VeRA": (peft.VeraConfig, {"r": 2, "save_projection": False}, {"projection_prng_key": 7}),
    }


def under(kind, required, changed):
    """A model under such an adapter, always with the same weights."""
    from peft import get_peft_model

    torch.manual_seed(1)
    adapter = kind(target_modules=["q_proj"], **required, **changed)
    return get_peft_model(copy.deepcopy(build("qwen2_5_vl")[0]), adapter).eval()


@pytest.mark.parametrize("method", ["OFT", "WaveFT", "SHiRA", "FourierFT", "VBLoRA", "HRA", "VeRA"])
def test_settings_of_an_adapter_outside_its_weights_count(method):
    from tieredkv.models.fingerprint import adapter_weights, model_state, state_difference

    kind, required, changed = methods()[method]
    first, again, other = (under(kind, required, more).get_base_model() for more in ({}, {}, changed))
    assert adapter_weights(first) == adapter_weights(other)
    before = json.loads(json.dumps(model_state(first)))
    assert state_difference(before, model_state(again)) is None
    assert state_difference(before, model_state(other))


def test_an_adapter_with_other_settings_is_refused_by_their_names(processor, film, tmp_path):
    kind, required, changed = methods()["WaveFT"]
    model = under(kind, required, {})
    with tieredkv.open_session(model, film, processor=processor, fps=4, gpu_kv_gb=1) as session:
        session.save(tmp_path / "s.tkv")
        with pytest.raises(SessionError, match=r"adapter\.default\.scaling was 25.0, is 3.0"):
            tieredkv.load_session(tmp_path / "s.tkv", under(kind, required, changed), processor=processor)
        tieredkv.load_session(tmp_path / "s.tkv", under(kind, required, {}), processor=processor).close()
        model.get_base_model().model.language_model.layers[1].self_attn.q_proj.waveft_scaling["default"] = 3.0
        with pytest.raises(SessionError, match=r"this session was opened .*waveft_scaling.default was 25.0"):
            session.ask(QUESTION, max_new_tokens=1)


def test_settings_that_change_nothing_do_not_count(wrapped):
    from tieredkv.models.fingerprint import model_state

    inside, now = wrapped.get_base_model(), wrapped.peft_config["a"]
    before = model_state(inside)
    now.base_model_name_or_path, now.revision, now.lora_dropout, now.init_lora_weights = "elsewhere", "2", 0.5, False
    now.inference_mode, now.target_modules, now.bias = not now.inference_mode, "(q|v)_proj", "all"
    assert model_state(inside) == before


@pytest.mark.parametrize("method", ["OFT", "VeRA", "LoRA"])
def test_weights_and_settings_of_an_idle_adapter_do_not_count(method):
    from tieredkv.models.fingerprint import fingerprint_difference, model_fingerprint, model_state

    kind, required, _ = {**methods(), "LoRA": (type(config()), {"r": 2}, {})}[method]
    wrapped = under(kind, required, {})
    inside = wrapped.get_base_model()
    before, state = model_fingerprint(inside), model_state(inside)
    wrapped.add_adapter("idle", kind(target_modules=["q_proj"], **required))
    assert fingerprint_difference(before, model_fingerprint(inside)) is None
    assert model_state(inside) == state


def test_with_an_adapter_in_offloaded_layers_sessions_answer_but_are_not_saved(processor, film, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(build("qwen2_5_vl")[0]), config(), adapter_name="a").eval()
    fill(model)
    options = {"processor": processor, "fps": 4, "gpu_kv_gb": 1}
    expected = tieredkv.generate(model, film, QUESTION, max_new_tokens=3, **options).token_ids
    accelerate.cpu_offload(model.get_base_model().model.language_model.layers, execution_device=torch.device("cpu"))
    with tieredkv.open_session(model, film, **options) as session:
        assert session.ask(QUESTION, max_new_tokens=3).token_ids == expected
        with pytest.raises(UnsupportedModelError, match="not in memory"):
            session.save(tmp_path / "s.tkv")
