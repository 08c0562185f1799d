"""Decoding from a cache on disk, compared with the same cache in host memory.

    python benchmarks/disk.py                 the bundled model, 32,768 tokens (68 minutes of film); minutes
    python benchmarks/disk.py --bits 4        in 4 bits
    python benchmarks/disk.py --quick         a short film, as a check that it runs

One session is saved, and loaded four times: into memory; with a `host_kv_gb` that holds the records of a share of the
cache, a tenth by default, the others on disk, where the system may keep the file in its own cache (`disk`), or is told
to drop it before every step (`disk, cold`: what a machine whose memory is full pays); and with the least `host_kv_gb`
that works, cold. All are asked the same questions in turn, one to warm up and `--rounds` others, and say the same
tokens; times are medians.

Prints a table, and ends with one line of JSON, a row for each: `host_bytes` of keys and values, `decode_ms` per token,
`ttft_s`, the first of them to the first token, whose prefill reads the whole cache in order; of the steps alone,
`read_bytes_per_token`, from the file, and `disk_hit_rate`, the share of chunks copied to the device that were in host
memory; and `read_bytes` of the answer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from origin import origin, report, rounded  # before torch: it sets how torch's threads wait

# isort: split
import torch
from bytes import Say

import tieredkv
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.planning import disk_plan, sizes
from tieredkv.tiny import model as tiny
from tieredkv.tiny.evaluate import TOKENS_PER_SECOND
from tieredkv.tiny.scene import make_scene, questions

RESULT = Path(__file__).parent / "results" / "disk.json"
SEED = 1_500_000


class Steps:
    """A stopping criterion that never stops: notes what was read before each step, and drops the system's copy."""

    def __init__(self, session: Any, file: int | None) -> None:
        """file: the descriptor to drop the pages of; None: none."""
        self._disk, self._file = session._cached.cache.device_tier.disk, file
        self.before: tuple[int, int, int] = (0, 0, 0)

    def counts(self) -> tuple[int, int, int]:
        if self._disk is None:
            return 0, 0, 0
        counts = self._disk.counts
        return counts.read_bytes, counts.hits, counts.misses

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> bool:
        if self.before == (0, 0, 0):
            self.before = self.counts()
        drop(self._file)
        return False


def drop(file: int | None) -> None:
    """Drop what the system keeps of a file in memory."""
    if file is not None:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def ask(session: Any, file: int | None, question: str, said: list[int]) -> dict[str, float]:
    """The figures of one answer. said: its tokens. file: as for `Steps`."""
    steps = Steps(session, file)
    drop(file)
    answer = session.ask(
        question,
        max_new_tokens=len(said),
        logits_processor=[Say(said)],
        stopping_criteria=[steps],
        evidence=False,
    )
    assert answer.token_ids == said
    read, hits, misses = (after - before for after, before in zip(steps.counts(), steps.before, strict=True))
    return {
        "tokens": answer.stats.prompt_tokens,
        "host_bytes": answer.stats.kv_host_bytes,
        "decode_ms": answer.stats.tpot_ms,
        "ttft_s": answer.stats.ttft_s,
        "read_bytes_per_token": read / (len(said) - 1),
        "hits": hits,
        "misses": misses,
        "read_bytes": answer.stats.disk_read_bytes,
        "hit_rate": answer.stats.hit_rate,
    }


def summary(answers: list[dict[str, float]]) -> dict[str, Any]:
    """A row, from the figures of its answers."""
    column = {name: [answer[name] for answer in answers] for name in answers[0]}
    hits, misses = sum(column["hits"]), sum(column["misses"])
    return {
        "tokens": max(column["tokens"]),
        "host_bytes": max(column["host_bytes"]),
        "decode_ms": statistics.median(column["decode_ms"]),
        "ttft_s": statistics.median(column["ttft_s"]),
        "read_bytes_per_token": round(statistics.mean(column["read_bytes_per_token"])),
        "disk_hit_rate": hits / (hits + misses) if hits + misses else None,
        "read_bytes": round(statistics.mean(column["read_bytes"])),
        "hit_rate": statistics.mean(column["hit_rate"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=8)
    parser.add_argument("--share", type=float, default=0.1, help="of the records, in host memory")
    parser.add_argument("--cap", type=float, default=0.1, help="the cap, as a share of the cache in 16 bits")
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=9, help="questions, after one to warm up")
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's by default")
    parser.add_argument("--out", type=Path, help=f"also write the result here, as {RESULT} was")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.cap, arguments.rounds, arguments.new_tokens = 2048, 0.5, 1, 5
        arguments.share = 0.3
    seconds = round(arguments.tokens / TOKENS_PER_SECOND)
    scene = make_scene(SEED, seconds, 12 if seconds > 240 else 4)
    texts = list(dict.fromkeys(one.text for one in questions(scene, SEED, 40)))[: arguments.rounds + 1]
    model, processor = tiny.load()
    model.generation_config.eos_token_id = None
    shape = model_shape(model.config, model.dtype)
    options = {
        "gpu_kv_gb": arguments.cap * arguments.tokens * shape.token_bytes / GIB,
        "budget_ratio": arguments.budget,
        "host_kv_bits": arguments.bits,
    }
    tiers = tieredkv.TierConfig(**{name: value for name, value in options.items() if name != "budget_ratio"})
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "film.tkv"
        with tieredkv.open_session(model, scene.frames(), processor=processor, fps=tiny.FPS, **options) as session:
            answers = {text: session.ask(text, max_new_tokens=arguments.new_tokens) for text in texts}
            asked = {text: answer.token_ids for text, answer in answers.items()}
            tokens = max(answer.stats.prompt_tokens for answer in answers.values())
            session.save(path)
            ingest_s = session.ingest_s
        least = disk_plan.least_bytes(shape, tiers, tokens, arguments.bits)
        records = sizes.records_bytes(shape, tiers, tokens, arguments.bits)
        tenth = least - records // disk_plan.LEAST_SHARE + round(arguments.share * records)
        kinds = {
            "memory": (None, False),
            "disk": (tenth / GIB, False),
            "disk, cold": (tenth / GIB, True),
            "least, cold": (1.02 * least / GIB, True),
        }
        print(f"{'':>12} {'host MiB':>9} {'ms/token':>9} {'KiB/token':>10} {'in memory':>10} {'first s':>8}")
        answered: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
        with ExitStack() as stack:
            file = stack.enter_context(path.open("rb")).fileno()
            mapped = Path(shutil.copy(path, path.with_name("mapped.tkv")))  # what is mapped cannot be dropped
            sessions = {
                name: stack.enter_context(
                    tieredkv.load_session(path if host else mapped, model, processor=processor, host_kv_gb=host)
                )
                for name, (host, _) in kinds.items()
            }
            for number, (text, said) in enumerate(asked.items()):
                for name, (_, cold) in kinds.items():
                    figures = ask(sessions[name], file if cold else None, text, said)
                    if number:  # the first warms up
                        answered[name].append(figures)
        rows = [{"cache": name, **summary(answers)} for name, answers in answered.items()]
    print(f"{'':>12} {'host MiB':>9} {'ms/token':>9} {'KiB/token':>10} {'in memory':>10} {'first s':>8}")
    for row in rows:
        hits = "-" if row["disk_hit_rate"] is None else f"{row['disk_hit_rate']:.1%}"
        print(
            f"{row['cache']:>12} {row['host_bytes'] / 2**20:9.2f} {row['decode_ms']:9.2f} "
            f"{row['read_bytes_per_token'] / 2**10:10.1f} {hits:>10} {row['ttft_s']:8.2f}",
            flush=True,
        )
    result = {
        "benchmark": "disk",
        **origin("av"),
        "threads": torch.get_num_threads(),
        "bits": arguments.bits,
        "share": arguments.share,
        "cap_share": arguments.cap,
        "budget": arguments.budget,
        "ingest_s": round(ingest_s, 2),
        "record_bytes": records,
        "rows": rounded(rows),
    }
    report(result, arguments.out)


if __name__ == "__main__":
    main()
