"""Train the bundled model from scratch: `python -m tieredkv.tiny.train --out DIR`.

Takes about three quarters of an hour on two CPU cores. Each stage writes a checkpoint into DIR, and a run that was
stopped resumes from the last one. `DIR/log.jsonl` has the numbers, `DIR/weights` the model after the latest stage.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tieredkv.storage.atomic import replace_file
from tieredkv.tiny.clips import Clips
from tieredkv.tiny.model import ARCHITECTURES, build_model, save
from tieredkv.tiny.processor import build_processor
from tieredkv.tiny.prompts import tokenize_with
from tieredkv.tiny.train_decoder import CURRICULUM, train_stage
from tieredkv.tiny.train_vision import accuracy, train_vision

VISION_STEPS = 1600
CLIP_SEED = 100_000  # first scene seed of the clips; each stage has 10,000 of its own


def train(
    out: Path,
    quick: bool = False,
    seed: int = 0,
    architecture: str = ARCHITECTURES[0],
    device: str | None = None,
) -> None:
    """Run the stages that are not done: vision, then the curriculum. `quick` is a smoke test.

    device: by default the GPU, if there is one.
    """
    if not 0 <= seed < 50:
        raise ValueError(f"seed {seed} is not in 0 .. 49: larger ones would train on scenes reserved for evaluation")
    out.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {"quick": quick, "seed": seed}
    if architecture != ARCHITECTURES[0]:
        run["architecture"] = architecture
    _check_run(out / "run.json", run)
    torch.manual_seed(seed)
    model = build_model(architecture).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    tokenize = tokenize_with(build_processor(architecture).tokenizer)

    def report(line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with (out / "log.jsonl").open("a") as log:
            log.write(text + "\n")

    if not _load_checkpoint(out / "vision.pt", model, None):
        started = time.perf_counter()
        train_vision(model, tokenize, 10 if quick else VISION_STEPS, report, seed=seed)
        shape, colour, letter = accuracy(model, tokenize, range(1_000_000, 1_000_002 if quick else 1_000_020))
        seconds = round(time.perf_counter() - started, 1)
        report({"done": "vision", "shape": shape, "colour": colour, "letter": letter, "seconds": seconds})
        _save_checkpoint(out / "vision.pt", model, None)

    model.model.visual.requires_grad_(False)
    decoder = [p for p in model.model.language_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decoder, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    clips: Clips | None = None
    for number, stage in enumerate(CURRICULUM):
        path = out / f"decoder-{number}.pt"
        if _load_checkpoint(path, model, optimizer):
            continue
        started = time.perf_counter()
        if clips is None or not quick:
            clips = Clips(model, CLIP_SEED + 10_000 * number + seed, *((120, 20) if quick else ()))
        if quick:
            low, high = stage.lengths
            stage = replace(stage, steps=2, lengths=(low, min(high, 2 * low)), tokens=1_000)
        warmup = 100 if number == 0 else 10
        steps = train_stage(model, tokenize, optimizer, clips, stage, seed * 1000 + number, report, warmup)
        report({"done": stage.name, "steps": steps, "seconds": round(time.perf_counter() - started, 1)})
        _save_checkpoint(path, model, optimizer)
        save(model, out / "weights")
    save(model, out / "weights")


def _check_run(path: Path, run: dict[str, Any]) -> None:
    """Refuse to resume from checkpoints of a run with other settings."""
    if path.exists() and (before := json.loads(path.read_text())) != run:
        raise SystemExit(f"{path.parent} holds a run with {before}, this one has {run}: give another --out.")
    path.write_text(json.dumps(run))


def _save_checkpoint(path: Path, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict() if optimizer else None}
    with replace_file(path) as part:
        torch.save(state, part)


def _load_checkpoint(path: Path, model: Any, optimizer: torch.optim.Optimizer | None) -> bool:
    """Load a checkpoint; returns whether there is one."""
    if not path.exists():
        return False
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled tiny video model from scratch.")
    parser.add_argument("--out", type=Path, default=Path("tiny-model"), help="folder for checkpoints, log and weights")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default=ARCHITECTURES[0])
    parser.add_argument("--device", help="such as cuda or cpu; the GPU, if there is one")
    arguments = parser.parse_args()
    train(arguments.out, arguments.quick, arguments.seed, arguments.architecture, arguments.device)


if __name__ == "__main__":
    main()
