"""`weights=`: the bundled model in 4 and 8 bits, really loaded on the CPU, counted before, asked, saved and loaded."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from command_line import run
from families import build
from torch import nn

import tieredkv
from tieredkv.errors import OptionError, SessionError, UnsupportedModelError
from tieredkv.models import families, loading, quantising
from tieredkv.models.quantising import PACKAGES, kept_modules, quantised_config
from tieredkv.planning.weight_bytes import weight_bytes
from tieredkv.tiny.model import PATH

QUESTION = "what colour was the star ?"
WEIGHTS = [
    pytest.param(weights, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}"))
    for weights, package in PACKAGES.items()
]


@pytest.fixture(scope="module")
def quantised():
    """The bundled model by `weights`, loaded when it is first asked for."""
    models = {}

    def load(weights):
        if weights not in models:
            models[weights] = loading.load(PATH, None, weights)
        return models[weights]

    return load


def kinds(module):
    return {type(part.weight).__name__ for part in module.modules() if isinstance(part, nn.Linear)}


@pytest.mark.model
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_decoder_is_quantised_and_everything_of_pictures_and_the_output_are_not(quantised, weights):
    model, _ = quantised(weights)
    assert kinds(model.model.language_model) == {{"4bit": "Params4bit", "8bit": "Int8Tensor"}[weights]}
    assert kinds(model.model.visual) | {type(model.lm_head.weight).__name__} == {"Parameter"}


@pytest.mark.model
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_plan_counts_what_is_loaded_then(quantised, weights):
    model, _ = quantised(weights)
    config = loading.load_config(PATH)
    dtype = loading.stored_dtype(config)
    planned = weight_bytes(quantised_config(config, weights, dtype), dtype)
    assert planned == weight_bytes(model.config, dtype, model)
    assert planned["decoder_bytes"] < 0.6 * weight_bytes(config, dtype)["decoder_bytes"]
    assert tieredkv.plan(PATH, 1000, weights=weights).decoder_bytes == planned["decoder_bytes"]


@pytest.mark.model
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_full_budget_equals_stock_transformers_with_the_same_weights(quantised, weights, frames):
    from helpers import session_logits, stock_inputs, stock_logits

    model, processor = quantised(weights)
    with tieredkv.open_session(model, frames, fps=4.0, processor=processor, positions="stock") as session:
        ours = session_logits(session, QUESTION, 3)
    stock = stock_logits(model, stock_inputs(processor, frames, QUESTION, 4.0), 3)
    assert torch.allclose(ours, stock, atol=0.15, rtol=0.02)  # bfloat16
    assert (ours.argmax(-1) == stock.argmax(-1)).all()


@pytest.mark.model
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_session_is_loaded_with_the_weights_it_was_saved_with_and_no_others(
    monkeypatch, tmp_path, short_video, capsys, weights
):
    path = tmp_path / "film.tkv"
    asked = ["ask", QUESTION, "--session", str(path), "--max-new-tokens", "3"]
    code, first, _ = run(
        monkeypatch, capsys, *asked[:1], str(short_video), *asked[1:], "-m", "tiny", "--weights", weights, "--fps", "4"
    )
    assert code == 0
    for options in ([], ["-m", "tiny"], ["--weights", weights]):
        code, again, _ = run(monkeypatch, capsys, *asked, *options)
        assert (code, again) == (0, first)
    other = next(one for one in PACKAGES if one != weights)
    code, _, err = run(monkeypatch, capsys, *asked, "--weights", other)
    assert code == 2
    assert f"was saved with weights='{weights}': leave out weights='{other}'" in err
    plain, processor = loading.load(PATH)
    with pytest.raises(SessionError, match="was saved with another model"):
        tieredkv.load_session(path, plain, processor=processor)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma4", "minicpmv4_6"])
def test_full_names_of_the_kept_modules_cover_every_family(kind):
    model = build(kind)[0]
    kept = kept_modules(model.config, torch.bfloat16)
    vision = families.video_family(model.config).vision_modules
    for name, _ in model.named_modules():
        inside = any(name == one or name.startswith(f"{one}.") for one in kept)
        assert inside == bool(vision.intersection(name.split(".")) or name == "lm_head"), name


# ---- refusals


def test_a_package_that_is_missing_is_named_before_anything_is_read(monkeypatch, capsys, tmp_path, short_video):
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    for command in (["ask", str(short_video), "what ?"], ["chat", str(short_video)]):
        code, out, err = run(monkeypatch, capsys, *command, "-m", "some/model", "--weights", "4bit")
        assert (code, out) == (2, "")
        assert "weights='4bit' needs the package bitsandbytes: pip install 'tieredkv[quantised]'." in err
    with pytest.raises(OptionError, match="needs the package torchao"):
        loading.load(PATH, None, "8bit")


def test_unknown_values_and_loaded_models_are_refused(video_model, processor, frames):
    with pytest.raises(OptionError, match="weights='2bit' is not valid: give '4bit' or '8bit'"):
        tieredkv.open_session(PATH, frames, weights="2bit")
    with pytest.raises(OptionError, match="is for a path or a hub id, and this model is loaded"):
        tieredkv.open_session(video_model, frames, processor=processor, weights="4bit")


def test_a_checkpoint_that_is_quantised_already_is_refused(tmp_path):
    for file in PATH.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((PATH / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"quantised already \(bitsandbytes, 4 bits\): leave out weights"):
        loading.load(tmp_path, None, "8bit")
