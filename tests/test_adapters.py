"""A cache belongs to the adapters it was made under: another, or none, or another scale, is refused by name."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from families import build

import tieredkv
from tieredkv.errors import SessionError

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
    """Adapters a, in use, and b."""
    from peft import get_peft_model

    made = get_peft_model(copy.deepcopy(build("qwen2_5_vl")[0]), config(), adapter_name="a")
    made.add_adapter("b", config())
    fill(made)
    return made.eval()


@pytest.fixture
def opened(wrapped, processor, film):
    with tieredkv.open_session(wrapped, film, processor=processor, fps=4, gpu_kv_gb=1) as session:
        yield session


@pytest.fixture
def saved(opened, tmp_path):
    """Under adapter a."""
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
def test_a_session_saved_under_an_adapter_is_refused_under_anything_else(saved, wrapped, processor, change, message):
    inside = wrapped.get_base_model()
    change(wrapped)
    with pytest.raises(SessionError, match=message):
        tieredkv.load_session(saved, inside, processor=processor)


@pytest.mark.parametrize(("change", "message"), OTHER.values(), ids=OTHER)
def test_an_open_session_is_refused_under_anything_else(opened, wrapped, tmp_path, change, message):
    change(wrapped)
    with pytest.raises(SessionError, match=f"this session was opened .*({message})"):
        opened.ask(QUESTION, max_new_tokens=1)
    with pytest.raises(SessionError, match="this session was opened"):
        opened.save(tmp_path / "of another.tkv")
    assert not (tmp_path / "of another.tkv").exists()


def test_going_back_to_the_adapter_goes_on(opened, saved, wrapped, processor):
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


def test_an_adapter_that_is_not_in_use_does_not_matter(saved, wrapped, processor):
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


def test_adapters_that_transformers_itself_loads_count_alike(processor, film, tmp_path, monkeypatch):
    # transformers asks for a newer PEFT than this needs
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


def test_a_file_written_before_adapters_were_recorded_loads_where_there_are_none(
    wrapped, processor, film, tmp_path, monkeypatch
):
    """What such a file says of weights covers all adapters, by the names that PEFT gives."""
    from tieredkv import saved, storage
    from tieredkv.fingerprint import model_fingerprint

    def old(path, manifest, tensors, progress):
        del manifest["model_state"]
        manifest["model"] = model_fingerprint(wrapped.get_base_model(), all_adapters=True)
        return write(path, json.loads(json.dumps(manifest)), tensors, progress)

    write = storage.write
    monkeypatch.setattr(saved.storage, "write", old)
    with wrapped.disable_adapter():
        with tieredkv.open_session(wrapped, film, processor=processor, fps=4, gpu_kv_gb=1) as session:
            session.save(tmp_path / "old.tkv")
        tieredkv.load_session(tmp_path / "old.tkv", wrapped, processor=processor).close()
    with pytest.raises(SessionError, match="under no adapter, now the adapter a is active"):
        tieredkv.load_session(tmp_path / "old.tkv", wrapped, processor=processor)
