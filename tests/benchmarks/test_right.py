"""The benchmark of which caches are right: every hybrid kind is compared, and what is wrong is said."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tieredkv.config import TierConfig
from tieredkv.models import families
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.decode_plan import plan_decode
from tieredkv.planning.sizes import lay_out

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import hybrids
import right

KIND = "gemma3_text"


@pytest.fixture
def main(monkeypatch, capsys):
    """`main(*options)`: exit code, last line as JSON, stdout and stderr, for one kind of model."""

    def running(*options: str) -> tuple[int, dict, str, str]:
        monkeypatch.setattr(right, "kinds", lambda: {KIND: families.find_decoder(KIND)})
        monkeypatch.setattr(sys, "argv", ["right.py", "--quick", "--device", "cpu", *options])
        with pytest.raises(SystemExit) as stop:
            right.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), json.loads(out.splitlines()[-1]), out, err

    return running


def test_every_supported_kind_with_layers_that_do_not_grow_is_compared():
    from transformers import CONFIG_MAPPING

    supported = {kind for each in families.DECODERS for kind in each.model_types if each.untiered}
    assert set(hybrids.kinds()) == {kind for kind in supported if kind in CONFIG_MAPPING}
    for kind, decoder in hybrids.kinds().items():
        model = hybrids.make_hybrid(kind, decoder, "cpu")
        layers = decoder.layer_types(model.config)
        assert set(layers) == {"full_attention", *decoder.untiered}
        assert sum(weight.numel() for weight in model.parameters()) < 2e7


def test_ours_is_right_and_the_column_of_the_offloaded_cache_is_empty_without_a_card(main, tmp_path):
    code, result, out, _ = main("--out", str(tmp_path / "right.json"))
    (row,) = result["rows"]
    assert code == 0
    assert row["family"] == KIND
    assert 0 < row["ours"] < 1e-4
    assert 0 < row["ours_tight"] < 1e-4
    assert (row["offloaded"], row["offloaded_error"]) == (None, "needs a card")
    assert "DynamicCache(offloading=True) needs a card" in out
    assert json.loads((tmp_path / "right.json").read_text()) == result


@pytest.mark.parametrize("error", [0.01, math.nan], ids=str)
@pytest.mark.parametrize("wrong", ["roomy", "tight"])
def test_a_wrong_logit_of_ours_is_exit_code_1(main, monkeypatch, wrong, error):
    whole = right.ours

    def off(model, tiers, ids, new_tokens):
        got = whole(model, tiers, ids, new_tokens)
        if (tiers.policy.theta > 1) == (wrong == "tight"):
            got[-1, 3] += error
        return got

    monkeypatch.setattr(right, "ours", off)
    code, result, _, err = main()
    column = {"roomy": "ours", "tight": "ours_tight"}[wrong]
    assert code == 1
    assert f"ours differs by more than 0.001: {KIND}\n" in err
    assert result["rows"][0][column] == (None if math.isnan(error) else pytest.approx(error, rel=0.01))


@pytest.fixture
def model():
    return hybrids.make_hybrid(KIND, families.find_decoder(KIND), "cpu")


def offloading(monkeypatch, cache):
    monkeypatch.setattr("transformers.DynamicCache", lambda config, offloading=False: cache(config, offloading))


def test_the_worst_run_of_the_offloaded_cache_counts(monkeypatch, model):
    results = iter([0.5, 2.0, 0.25])
    offloading(monkeypatch, lambda config, offloading: None)
    monkeypatch.setattr(right, "logits", lambda *arguments: torch.full((3,), next(results)))
    row = right.offloaded(model, torch.zeros(3), torch.zeros(1, 5), 2, runs=3)
    assert row == {"offloaded": 2.0, "offloaded_error": None}


def test_an_error_of_the_offloaded_cache_is_in_its_row(monkeypatch, model):
    def fails(config, offloading):
        raise RuntimeError("Expected all tensors to be on the same device\nmore")

    offloading(monkeypatch, fails)
    row = right.offloaded(model, torch.zeros(3), torch.zeros(1, 5), 2, runs=3)
    assert row["offloaded"] is None
    assert row["offloaded_error"] == "RuntimeError: Expected all tensors to be on the same device"


def test_logits_of_the_offloaded_cache_that_are_no_numbers_are_an_error(monkeypatch, model):
    offloading(monkeypatch, lambda config, offloading: None)
    monkeypatch.setattr(right, "logits", lambda *arguments: torch.full((3,), math.nan))
    row = right.offloaded(model, torch.zeros(3), torch.zeros(1, 5), 2, runs=1)
    assert row == {"offloaded": None, "offloaded_error": "its logits are not finite"}


def test_under_the_tightest_cap_everything_is_attended_to_and_with_one_page_less_it_is_not():
    shape, dynamic = KVShape(2, 8, 4, 64, 4), torch.zeros((2, 4), dtype=torch.bool)
    tiers = right.tightest(shape, TierConfig(pack_pages=False), 1000, 8)
    layout = lay_out(tiers, 1000, tiers.policy.text_window, 8)

    def ranked(cap_bytes):
        return plan_decode(shape, tiers, layout, cap_bytes, dynamic.double(), dynamic, host_bits=16).ranked

    assert not ranked(tiers.cap_bytes)
    assert ranked(tiers.cap_bytes - 8 * 64 * 2 * 4)


def test_a_card_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["right.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        right.main()
    assert "there is no CUDA device here" in capsys.readouterr().err
