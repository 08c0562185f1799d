"""What is said where packages with kernels are missing: once, with the remedy, and only where it would help."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from families import build
from helpers import text_config

import tieredkv
from tieredkv.models import kernels

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
PACKAGES = ["flash-linear-attention", "causal-conv1d"]


@pytest.fixture
def install(monkeypatch):
    """A function that sets which packages are installed."""

    def installed(*names):
        def version(name):
            if name in names:
                return "1.0"
            raise PackageNotFoundError(name)

        monkeypatch.setattr(kernels, "version", version)

    installed()
    return installed


def test_only_what_is_missing_is_named(install):
    config = text_config("qwen3_5_text")
    assert kernels.missing_packages(config) == PACKAGES
    assert kernels.advice(config, CARD).endswith("pip install flash-linear-attention causal-conv1d")
    install("causal-conv1d")
    assert kernels.advice(config, CARD).endswith("pip install flash-linear-attention")
    install(*PACKAGES)
    assert kernels.advice(config, CARD) is None


def test_nothing_is_advised_where_it_would_not_help(install):
    assert kernels.advice(text_config("qwen3_5_text"), CPU) is None
    assert kernels.advice(text_config("llama"), CARD) is None
    assert kernels.advice(text_config("gemma3_text"), CARD) is None


def test_the_first_answer_of_a_session_says_so_once(frames, install, monkeypatch):
    model, processor = build("qwen3_5")
    want = kernels.advice(model.config, CARD)

    def said():
        """By two answers of a session."""
        options = {"processor": processor, "gpu_kv_gb": 1, "fps": 4}
        with (
            tieredkv.open_session(model, frames[:8], **options) as session,
            warnings.catch_warnings(record=True) as seen,
        ):
            warnings.simplefilter("always")
            for _ in range(2):
                session.ask("what ?", max_new_tokens=1)
        return [text for warning in seen if "pip install" in (text := str(warning.message))]

    assert said() == []
    monkeypatch.setattr(kernels, "advice", lambda config, device: want)
    assert said() == [want]
