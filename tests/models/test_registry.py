"""One place per family: what settings, plans and messages need is asked of the family and of its decoder."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import BUILD, build
from helpers import text_config

import tieredkv
from tieredkv.doctor.checks import FLOORS
from tieredkv.environment.versions import NEWEST, OLDEST
from tieredkv.errors import UnsupportedModelError
from tieredkv.models import families
from tieredkv.models.families.decoder import TIERED, Decoder
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.settings import model_settings
from tieredkv.planning.forecast import plan

EVERY_FAMILY = pytest.mark.parametrize("name", BUILD)


def test_no_kind_of_model_is_listed_twice():
    listed = [kind for each in (*families.FAMILIES, *families.DECODERS) for kind in each.model_types]
    assert Counter([*listed, *families.REFUSED]).most_common(1)[0][1] == 1


def test_every_family_has_a_test_model():
    assert set(BUILD) == set(families.VIDEO_FAMILIES)


def test_tested_releases_lie_within_the_supported_ones():
    def numbers(text):
        return tuple(map(int, text.split(".")))

    constraints = (Path(tieredkv.__file__).parents[1] / "constraints.txt").read_text("utf-8")
    locked = re.search(r"^transformers==(\d+\.\d+)", constraints, re.MULTILINE)
    assert numbers(OLDEST) == FLOORS["transformers"]
    assert locked[1] == NEWEST
    for each in (*families.FAMILIES, *families.DECODERS):
        oldest, newest = map(numbers, each.tested)
        assert numbers(OLDEST) <= oldest <= newest <= numbers(NEWEST)


@EVERY_FAMILY
def test_a_family_names_all_modules_that_are_not_its_decoder(name):
    model, _ = build(name)
    family, planned = families.VIDEO_FAMILIES[name], plan(model, 100, gpu_kv_gb=1)
    text = {id(weight): weight for weight in family.decoder(model).parameters()}
    text |= {id(weight): weight for weight in model.lm_head.parameters()}
    assert planned.decoder_bytes == sum(weight.nbytes for weight in text.values())
    paths = {part for key, _ in model.named_parameters() for part in key.split(".")}
    assert family.vision_modules <= paths


@EVERY_FAMILY
def test_settings_hold_what_a_family_and_its_decoder_add(name):
    model, _ = build(name)
    family, settings = families.VIDEO_FAMILIES[name], model_settings(model)
    decoder = families.text_decoder(model.config.get_text_config(decoder=True))
    assert set(family.settings) <= settings.keys()
    assert set(family.vision_settings) <= settings["vision"].keys()
    assert set(decoder.settings) <= settings["text"].keys()


@EVERY_FAMILY
def test_a_family_names_the_types_of_its_texts(name):
    model, _ = build(name)
    family = families.VIDEO_FAMILIES[name]
    assert model.config.get_text_config(decoder=True).model_type in family.text_types()
    assert None not in map(families.find_decoder, family.text_types())


def test_a_kind_that_cannot_be_supported_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(families.REFUSED, "odd", "it attends to the future")
    for look_up in (families.video_family, families.text_decoder):
        with pytest.raises(UnsupportedModelError, match="'odd' cannot be supported: it attends to the future"):
            look_up(SimpleNamespace(model_type="odd"))


class Wide(Decoder):
    """Full layers of other sizes than the sliding ones."""

    def kv_dims(self, text, kind):
        return (1, 64) if kind == TIERED else super().kv_dims(text, kind)


def test_layers_of_each_type_have_the_sizes_that_the_decoder_states(monkeypatch):
    monkeypatch.setattr(families, "DECODERS", (Wide(("gemma3_text",), untiered=("sliding_attention",)),))
    shape = model_shape(text_config("gemma3_text"), torch.bfloat16)
    assert (shape.num_key_value_heads, shape.head_dim, shape.token_bytes) == (1, 64, 2 * 2 * 64 * 2)
    assert (shape.sliding_layers, shape.sliding_token_bytes) == (2, 2 * 2 * 16 * 2)


def test_a_decoder_with_states_must_state_their_size(monkeypatch):
    monkeypatch.setattr(families, "DECODERS", (Decoder(("qwen3_5_text",), untiered=("linear_attention",)),))
    with pytest.raises(NotImplementedError, match=r"qwen3_5_text .*linear_attention"):
        model_shape(text_config("qwen3_5_text"), torch.float32)
