"""Tiny random models, built offline: weights scaled up so that attention is sharp and errors show."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line: the suite passes beside a busy process

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run anywhere

from helpers import random_text_model, text_config

from tieredkv.cli.defaults import KEYS
from tieredkv.ops import select
from tieredkv.ops.base import Ops
from tieredkv.ops.select import TORCH, numba, triton

hypothesis.settings.register_profile("any load", deadline=None)  # examples of 200 ms fail beside a busy process
hypothesis.settings.load_profile("any load")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands use no defaults and no history but a test's own."""
    folder = str(tmp_path_factory.mktemp("settings"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", folder)
        patch.setenv("XDG_STATE_HOME", folder)
        for key in KEYS:
            patch.delenv(f"TIEREDKV_{key.upper()}", raising=False)
        yield


class _Deprecations(logging.Handler):
    """Collects deprecations that transformers logs instead of raising warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in (message := record.getMessage()):
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_deprecated_names() -> Iterator[None]:
    """Our calls use no name that transformers logs as deprecated; it logs each once a process."""
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages, f"transformers: {handler.messages}"


@pytest.fixture(scope="module")
def torch_operations() -> Iterator[None]:
    """On a CPU steps run by torch, also where Numba is installed: for tests of what is computed, or held, there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_on_a_cpu", lambda: TORCH)
        yield


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a card if there is one, else Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels() -> Ops:
    """Triton's kernels, compiled or interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return triton()


@pytest.fixture
def compiled() -> Ops:
    """Operations compiled for a CPU."""
    pytest.importorskip("numba", reason="Numba is not installed")
    return numba()


@pytest.fixture(params=["torch", "numba", pytest.param("triton", marks=pytest.mark.interpreter)])
def ops(request: pytest.FixtureRequest) -> Ops:
    """Every implementation of a decoding step's operations."""
    fixtures = {"numba": "compiled", "triton": "kernels"}
    return TORCH if request.param == "torch" else request.getfixturevalue(fixtures[request.param])


def _sharpen(model: torch.nn.Module, factor: float = 2.0) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(factor)
    return model.eval()


@pytest.fixture(
    scope="session", params=["llama", "qwen2", "qwen3", "gemma3_text", "gemma4_text", "qwen3_5_text", "lfm3"]
)
def text_model(request: pytest.FixtureRequest) -> Any:
    return random_text_model(request.param)


@pytest.fixture(scope="session")
def llama() -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(text_config("llama")).eval()


@pytest.fixture
def when_stopped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`when_stopped(session, action)`: call `action` once the session, or a job of it, has been asked to stop."""
    from tieredkv.session.job import Job

    def register(session: Any, action: Any) -> None:
        stop_job, stop_session = Job.stop, session.stop

        def stopping_job(job: Job) -> None:
            stop_job(job)
            if job in session._turns.line:
                action()

        def stopping_session() -> None:
            stop_session()
            action()

        monkeypatch.setattr(Job, "stop", stopping_job)
        monkeypatch.setattr(session, "stop", stopping_session)

    return register


@pytest.fixture(scope="session")
def processor() -> Any:
    from tieredkv.tiny.model import build_processor

    return build_processor()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One token per byte: transformers' stop strings need the text of every token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="session")
def video_model() -> Any:
    """The bundled model's architecture with random weights."""
    from tieredkv.tiny.model import build_model

    torch.manual_seed(1)
    model = _sharpen(build_model())
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="session")
def frames() -> np.ndarray:
    """120 frames of noise: 240 visual tokens."""
    return np.random.default_rng(0).integers(0, 256, (120, 56, 56, 3), dtype=np.uint8)


@pytest.fixture
def prompt_ids() -> torch.Tensor:
    return torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def long_ids() -> torch.Tensor:
    """900 tokens: long enough that a quarter of the cache holds the recent region and more."""
    return torch.randint(0, 97, (1, 900), generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Twenty seconds of noise in each kind of file."""
    from films import KINDS, noise, write

    folder, pictures = tmp_path_factory.mktemp("whole"), noise(200, 32, 48)
    return {name: write(folder / name, pictures, **options) for name, options in KINDS.items()}


@pytest.fixture(scope="session")
def steady(tmp_path_factory):
    """Four seconds of numbered pictures without B-frames, a key frame each half second."""
    from films import numbered, write

    return write(tmp_path_factory.mktemp("steady") / "steady.mkv", numbered(40), bf="0", g="5")


@pytest.fixture(scope="session")
def short_video(tmp_path_factory):
    """Thirty seconds for the bundled model: moon, fish, cup and triangle appear."""
    from tieredkv.tiny.scene import make_scene
    from tieredkv.tiny.video import write_video

    return write_video(make_scene(1_000_001, 30, 4), tmp_path_factory.mktemp("video") / "short.mp4")
