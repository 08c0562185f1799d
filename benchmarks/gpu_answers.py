"""Right answers first: the bundled model on the card beside the same on the CPU, whole sessions, greedy, in float32."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_record import Fact, Run, Values
from step_bench import Bench
from step_exactness import exactness

import tieredkv
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.tiny.model import FPS, load
from tieredkv.tiny.scene import make_scene, questions

SEED, CARDS = 2_000_003, 4


def facts(run: Run) -> list[Fact]:
    answers = Answers(run)
    cases: dict[str, dict[str, Any]] = {
        "a fifth of the cache": {"share": 0.2},
        "everything fits": {"share": 2.0},
        "16-bit pages": {"share": 0.2, "pack_pages": False, "host_kv_bits": 16},
        "host chunks in 16 bits": {"share": 0.2, "host_kv_bits": 16},
        "host chunks in 4 bits": {"share": 0.2, "host_kv_bits": 4},
        "adaptive": {"share": 0.2, "adaptive": True},
        "copied ahead": {"share": 0.2, "ahead": True},
        "no evidence": {"share": 0.2, "evidence": False},
    }
    small = Bench(run, "tiny", 2048 if run.dry else 8192, torch.float32)
    return [
        Fact("replayed steps are eager ones", 60, partial(exactness, small, eager_only=())),
        Fact("models", 40, answers.models),
        *(Fact(name, 40, partial(answers.compare, **options)) for name, options in cases.items()),
        Fact("saved, loaded, and a conversation", 30, answers.saved),
    ]


class Answers:
    """One video, its questions, and the model on both devices."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.scene = make_scene(SEED, 15 if run.dry else 60, CARDS)
        self.asked = questions(self.scene, SEED, 2 if run.dry else 6)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    @cached_property
    def frames(self) -> np.ndarray:
        return np.concatenate(list(self.scene.render()))

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return load()

    @cached_property
    def on_card(self) -> Any:
        return copy.deepcopy(self.loaded[0]).to(self.run.device)

    def models(self) -> Values:
        parameters = sum(part.numel() for part in self.on_card.parameters())
        return {"parameters": parameters, "frames": len(self.frames), "questions": len(self.asked)}

    def options(self, share: float, **more: Any) -> dict[str, Any]:
        """Options of a session whose cap is `share` of the full cache."""
        model, processor = self.loaded
        tokens = 8 * self.scene.seconds + 64
        cap = share * tokens * model_shape(model.config, model.dtype).token_bytes / GIB
        ranked = {"budget_ratio": share / 2} if share < 1 else {}
        return {"processor": processor, "fps": FPS, "gpu_kv_gb": cap + 2**-11, **ranked, **more}

    def compare(self, share: float, evidence: bool = True, **more: Any) -> Iterator[Values]:
        """Answers on the card and on the CPU, and the right ones."""
        options = self.options(share, **more)
        given: dict[str, list[Any]] = {}
        for name, model in (("cpu", self.loaded[0]), ("card", self.on_card)):
            with tieredkv.open_session(model, self.frames, **options) as session:
                given[name] = [session.ask(q.text, max_new_tokens=16, evidence=evidence) for q in self.asked]
        pairs = list(zip(given["cpu"], given["card"], self.asked, strict=True))
        last = given["card"][-1].stats
        yield {
            "questions": len(pairs),
            "same_tokens": sum(cpu.token_ids == card.token_ids for cpu, card, _ in pairs),
            "right_on_card": sum(card.text.split() == list(q.words) for _, card, q in pairs),
            "right_on_cpu": sum(cpu.text.split() == list(q.words) for cpu, _, q in pairs),
            "decode_paths": sorted({card.stats.decode_path for card in given["card"]}),
            "hit_rate": last.hit_rate,
            "device_peak_bytes": last.kv_device_peak_bytes,
            "cap_bytes": last.kv_cap_bytes,
            "prompt_tokens": last.prompt_tokens,
            "ttft_s": [card.stats.ttft_s for card in given["card"]],
            "tpot_ms": [card.stats.tpot_ms for card in given["card"]],
        }
        yield from (
            {"question": q.text, "cpu": cpu.text, "card": card.text}
            for cpu, card, q in pairs
            if cpu.token_ids != card.token_ids
        )

    def saved(self) -> Values:
        """A session saved on the CPU, loaded on the card; then a conversation of two turns on both."""
        options = self.options(0.3)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "session.tkv"
            said: list[list[str]] = []
            with tieredkv.open_session(self.loaded[0], self.frames, **options) as session:
                session.save(path)
                said.append([session.chat(q.text, max_new_tokens=12).text for q in self.asked[:2]])
            with tieredkv.load_session(path, self.on_card, processor=options["processor"]) as session:
                said.append([session.chat(q.text, max_new_tokens=12).text for q in self.asked[:2]])
        return {"same": said[0] == said[1], "cpu": said[0], "card": said[1]}
