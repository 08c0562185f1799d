"""The cap on a CUDA machine if none is given. The card is a fake: torch's answers about its memory, and no more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tieredkv import api
from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory import card
from tieredkv.memory.units import GIB
from tieredkv.models import loading
from tieredkv.session import default_cap
from tieredkv.storage import tensor_file
from tieredkv.tiny.model import PATH

CARD = torch.device("cuda", 0)


@pytest.fixture
def memory(monkeypatch):
    """Bytes of a card, by what torch is asked."""
    sizes = SimpleNamespace(free=8 * GIB, reserved=3 * GIB, allocated=2 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (sizes.free, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: sizes.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: sizes.allocated)
    return sizes


@pytest.fixture
def on_card(monkeypatch, memory):
    monkeypatch.setattr(default_cap, "cuda_devices", lambda model: [CARD])
    return memory


def opened(model, processor, **options):
    return api.new_session(model, processor=processor, **options)


def test_free_memory_includes_what_the_allocator_holds_unused(memory):
    assert card.free_device_bytes(CARD) == 9 * GIB


def test_the_default_follows_from_the_card_and_is_told(video_model, processor, on_card):
    with opened(video_model, processor) as session:
        cap = session.default_cap
        assert 7.5 < session.tiers.gpu_kv_gb == cap.gpu_kv_gb < 9
        assert cap.free_bytes == 9 * GIB
        assert str(cap).startswith(f"gpu_kv_gb={cap.gpu_kv_gb:g}: beside the weights the card has 9 GiB free, less 0.2")
    on_card.free -= 5 * GIB
    with opened(video_model, processor, host_kv_gb=1) as session:
        assert session.tiers.gpu_kv_gb == pytest.approx(cap.gpu_kv_gb - 5, abs=0.1)
        assert session.tiers.host_kv_gb == 1


def test_a_cap_that_is_given_stays(video_model, processor, on_card):
    for options in ({"gpu_kv_gb": 2}, {"tiers": TierConfig()}):
        with opened(video_model, processor, **options) as session:
            assert session.default_cap is None
            assert session.tiers.gpu_kv_gb == (2 if "gpu_kv_gb" in options else 4)


@pytest.fixture
def reloaded(video_model, processor, frames, tmp_path):
    """Saves a session opened, or loaded and saved again, and loads it."""

    def open_or_load(path, **options):
        if path.exists():
            return api.load_session(path, video_model, processor=processor, **options)
        return api.open_session(video_model, frames, processor=processor, fps=4, **options)

    def reload(opening=(), loading=()):
        with open_or_load(tmp_path / "film.tkv", **dict(opening)) as session:
            session.save(tmp_path / "film.tkv")
        return open_or_load(tmp_path / "film.tkv", **dict(loading))

    return reload


def test_a_saved_session_gets_the_default_of_the_card_it_is_loaded_to(reloaded, monkeypatch, on_card):
    with monkeypatch.context() as without:
        without.setattr(default_cap, "cuda_devices", lambda model: [])
        reloaded().close()  # saved on the CPU, and then again from what was loaded
    with reloaded() as large:
        assert 7.5 < large.tiers.gpu_kv_gb == large.default_cap.gpu_kv_gb < 9
    on_card.free -= 5 * GIB
    with reloaded() as small:
        assert small.tiers.gpu_kv_gb == pytest.approx(large.tiers.gpu_kv_gb - 5, abs=0.1)
    monkeypatch.setattr(default_cap, "cuda_devices", lambda model: [])
    with reloaded() as on_cpu:
        assert (on_cpu.tiers.gpu_kv_gb, on_cpu.default_cap) == (small.tiers.gpu_kv_gb, None)


@pytest.mark.parametrize("given", [{"opening": {"gpu_kv_gb": 2}}, {"loading": {"gpu_kv_gb": 2}}], ids=["saved", "now"])
def test_a_cap_that_was_given_stays_in_a_saved_session(reloaded, on_card, given):
    with reloaded(**given) as session:
        assert (session.tiers.gpu_kv_gb, session.default_cap) == (2, None)


def test_an_older_session_file_keeps_its_cap(reloaded, video_model, processor, on_card, tmp_path):
    reloaded(opening={"gpu_kv_gb": 2}).close()
    stored = tensor_file.read(tmp_path / "film.tkv")
    old = {name: part for name, part in stored.manifest.items() if name != "cap_is_default"}
    tensor_file.write(tmp_path / "old.tkv", old, {name: stored.tensor(name) for name in stored.names})
    with api.load_session(tmp_path / "old.tkv", video_model, processor=processor) as session:
        assert session.tiers.gpu_kv_gb == 2


def test_on_the_cpu_it_is_4(video_model, processor, memory):
    with opened(video_model, processor) as session:
        assert (session.tiers.gpu_kv_gb, session.default_cap) == (4, None)


def test_a_full_card_is_refused(video_model, processor, on_card):
    on_card.free, on_card.reserved = GIB // 2, on_card.allocated
    with pytest.raises(BudgetError, match=r"the card has 0\.5 GiB free beside the weights"):
        opened(video_model, processor)


def test_weights_larger_than_the_card_are_refused_before_they_are_read(monkeypatch, memory):
    from transformers import AutoModelForImageTextToText

    def refuse(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", refuse)
    memory.free, memory.reserved = GIB // 2, memory.allocated
    with pytest.raises(BudgetError, match=r"the card has 0\.5 GiB free: give weights='4bit', weights='8bit', or a sm"):
        loading.load(PATH, check=default_cap.check_weights_fit)
    memory.free = 2 * GIB
    with pytest.raises(AssertionError, match="weights were read"):
        loading.load(PATH, check=default_cap.check_weights_fit)


@pytest.mark.model
def test_a_prompt_beyond_the_trained_length_is_warned_of_once(frames, recwarn):
    model, processor = loading.load(PATH)
    model.config.get_text_config().max_position_embeddings = 20
    with api.open_session(model, frames, fps=4.0, processor=processor) as session:
        session.ask("what ?", max_new_tokens=2)
    said = [str(warning.message) for warning in recwarn if "made for" in str(warning.message)]
    assert len(said) == 1
    assert said[0].endswith("tokens, more than the 20 that the model is made for: answers may be poor.")
    assert "\n" not in said[0]
