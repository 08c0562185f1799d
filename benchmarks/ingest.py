"""Ingest and sessions by length of video, on the bundled model: memory, overlap of stages, time saved by a session.

    python benchmarks/ingest.py [--minutes 1 4 16 60] [--gpu-kv-gb 0.008] [--plot ingest.png] [--output ingest.json]

A video of each length is generated, and measured in a process of its own, so that peak memory is that of one video:

1. ingest, a question, a follow-up question;
2. the same video ingested again by a second session, whose answer must be the same;
3. the session saved, loaded and asked, whose answer must be the same;
4. the three stages one after the other on the main thread, for a measure of overlap that does not count waiting for a
   busy core as work: `speedup` is this time / that of step 2's ingest, both after a warm-up.

Prints a table and ends with one JSON line, a list with an entry per length (bytes, seconds): `peak_rss_bytes` of step
1, of which `base_rss_bytes` precede the video; `kv_device_peak_bytes` and `kv_cap_bytes`; `ttft_s` from the request to
the first token of the first answer, ingest included; `followup_ttft_s`, the second question's; `reingest_s`, the ingest
of step 2; `load_s`, until the loaded session can be asked; `loaded_ttft_s`, its first question, which reads and checks
the file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from origin import processor_name, versions

KIB = 1024 if sys.platform == "linux" else 1
"""Bytes per unit of `ru_maxrss`."""
CARDS = 12
QUESTION, FOLLOW_UP = "what colour was the star ?", "follow the moon for 4 ?"
SEED = 1_300_000


def measure(path: Path, minutes: float, gpu_kv_gb: float) -> dict[str, Any]:
    """A row, measured in this process."""
    import psutil
    import torch

    import tieredkv
    from tieredkv.tiny import model as tiny

    model, processor = tiny.load()
    with torch.no_grad():  # for memory that torch allocates once
        model.generate(torch.ones((1, 4), dtype=torch.long), max_new_tokens=2)
    base = psutil.Process().memory_info().rss
    options = {"gpu_kv_gb": gpu_kv_gb, "processor": processor, "fps": tiny.FPS}

    started = time.perf_counter()
    with tieredkv.open_session(model, path, **options) as session:
        opened = time.perf_counter() - started
        first = session.ask(QUESTION, max_new_tokens=8)
        follow_up = session.ask(FOLLOW_UP, max_new_tokens=8)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        done = session.ingest_stats
        saved = path.with_suffix(".tkv")
        started = time.perf_counter()
        size = session.save(saved)
        save_s = time.perf_counter() - started
    started = time.perf_counter()
    with tieredkv.open_session(model, path, **options) as again:
        reingest_s = time.perf_counter() - started
        warm = again.ingest_stats
        assert again.ask(FOLLOW_UP, max_new_tokens=8).token_ids == follow_up.token_ids
    started = time.perf_counter()
    with tieredkv.load_session(saved, model, processor=processor) as loaded:
        load_s = time.perf_counter() - started
        answer = loaded.ask(FOLLOW_UP, max_new_tokens=8)
        assert answer.token_ids == follow_up.token_ids
    saved.unlink()
    serial_s = one_after_the_other(model, processor, path, options)
    return {
        "minutes": minutes,
        "visual_tokens": done.visual_tokens,
        "frames": done.frames,
        "base_rss_bytes": base,
        "peak_rss_bytes": peak,
        "kv_host_bytes": first.stats.kv_host_bytes,
        "kv_full_bytes": first.stats.kv_full_bytes,
        "kv_device_peak_bytes": follow_up.stats.kv_device_peak_bytes,
        "kv_cap_bytes": first.stats.kv_cap_bytes,
        "decode_s": done.decode_s,
        "encode_s": done.encode_s,
        "prefill_s": done.prefill_s,
        "ingest_s": done.wall_s,
        "overlap": done.overlap,
        "serial_s": serial_s,
        "speedup": serial_s / warm.wall_s,
        "decoded_frames_per_s": done.frames / done.decode_s,
        "encoded_tokens_per_s": done.visual_tokens / done.encode_s,
        "prefilled_tokens_per_s": done.visual_tokens / done.prefill_s,
        "streamed_bytes": done.streamed_bytes,
        "ttft_s": opened + first.stats.ttft_s,
        "first_ttft_s": first.stats.ttft_s,
        "followup_ttft_s": follow_up.stats.ttft_s,
        "reingest_s": reingest_s,
        "session_bytes": size,
        "save_s": save_s,
        "load_s": load_s,
        "loaded_ttft_s": answer.stats.ttft_s,
    }


def one_after_the_other(model: Any, processor: Any, path: Path, options: dict[str, Any]) -> float:
    """Seconds for the same work if each stage ends before the next begins."""
    import torch

    from tieredkv import TierConfig
    from tieredkv.cache.tiered_cache import TieredCache
    from tieredkv.models import families
    from tieredkv.models.chat_template import ChatTemplate
    from tieredkv.models.encode import encode, segments
    from tieredkv.session.ingested_video import Place
    from tieredkv.session.prefill import first_steps, prefill
    from tieredkv.session.video_embeddings import VideoEmbeddings, prepare
    from tieredkv.video.frames import open_video
    from tieredkv.video.sampling import Sampling

    started = time.perf_counter()
    tiers = TierConfig(gpu_kv_gb=options["gpu_kv_gb"])
    template = ChatTemplate(families.video_family(model.config), processor)
    source = open_video(path, Sampling(options["fps"]))
    video = prepare(template, model.config, source, tiers)
    decoded = list(segments(video.source.frames(), video.segment_frames))
    encoded = list(encode(template.family, model, video.preprocess, iter(decoded)))
    with TieredCache(model.config, tiers, prompt_tokens=video.grid.tokens + 300) as cache:
        head, nothing = torch.zeros((1, 15), dtype=torch.long), first_steps(video.grid, 0)
        embeddings = VideoEmbeddings(template, model, video, nothing, iter(encoded))
        prefill(embeddings, head, cache, lambda: None, lambda tokens: None, Place())
    return time.perf_counter() - started


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw four panels over the length of the video."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [row["minutes"] for row in rows]
    figure, ((memory, times), (rates, overlap)) = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")

    below = {"fontsize": 8, "loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncol": 2}

    def lines(axes: Any, series: dict[str, list[float]], title: str, unit: str) -> None:
        for (label, values), style in zip(series.items(), ("o-", "s--", "^-", "d:", "v-."), strict=False):
            axes.plot(minutes, values, style, label=label)
        axes.set(xscale="log", yscale="log", title=title, ylabel=unit, xlabel="minutes of video")
        axes.set_xticks(minutes, [f"{value:g}" for value in minutes])
        axes.minorticks_off()
        axes.legend(**below)
        axes.grid(alpha=0.3)

    mib = 2**20
    lines(
        memory,
        {
            "resident memory in addition to the model's": [
                (r["peak_rss_bytes"] - r["base_rss_bytes"]) / mib for r in rows
            ],
            "cache in host memory": [r["kv_host_bytes"] / mib for r in rows],
            "device KV, peak": [r["kv_device_peak_bytes"] / mib for r in rows],
            "device KV, cap": [r["kv_cap_bytes"] / mib for r in rows],
        },
        "Memory",
        "MiB",
    )
    lines(
        times,
        {
            "ingest again": [r["reingest_s"] for r in rows],
            "follow-up question, to first token": [r["followup_ttft_s"] for r in rows],
            "loaded session, first question": [r["loaded_ttft_s"] for r in rows],
            "load": [r["load_s"] for r in rows],
        },
        "Time",
        "seconds",
    )
    lines(
        rates,
        {
            "decoded, frames/s": [r["decoded_frames_per_s"] for r in rows],
            "encoded, tokens/s": [r["encoded_tokens_per_s"] for r in rows],
            "prefilled, tokens/s": [r["prefilled_tokens_per_s"] for r in rows],
        },
        "Rate of each stage while all three run",
        "per second",
    )
    rates.set(yscale="linear", ylim=(0, None))
    places = range(len(rows))
    overlap.bar([p - 0.2 for p in places], [r["overlap"] for r in rows], 0.4, label="stages' seconds / wall time")
    overlap.bar([p + 0.2 for p in places], [r["speedup"] for r in rows], 0.4, label="one after the other / wall time")
    overlap.axhline(1, color="black", linewidth=0.8)
    overlap.set(title="Overlap of decoding, encoding and prefill", xlabel="minutes of video", ylabel="ratio")
    overlap.set_xticks(list(places), [f"{value:g}" for value in minutes])
    overlap.legend(**below)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 4, 16, 60])
    parser.add_argument("--gpu-kv-gb", type=float, default=0.008)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path, help="also write the JSON here, indented")
    parser.add_argument("--quick", action="store_true", help="one minute")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes = [1.0]
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.minutes[0], arguments.gpu_kv_gb)))
        return

    import torch

    from tieredkv.tiny.scene import make_scene
    from tieredkv.tiny.video import write_video

    rows = []
    print(f"{'minutes':>7} {'tokens':>7} {'RSS MiB':>8} {'device':>7} {'overlap':>8} {'speedup':>8} ", end="")
    print(f"{'ingest':>8} {'ttft':>8} {'follow-up':>9} {'load':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for minutes in arguments.minutes:
            path = write_video(make_scene(SEED, round(minutes * 60), CARDS), Path(folder) / f"{minutes:g}.mp4")
            command = [sys.executable, __file__, "--one", str(path), "--minutes", str(minutes)]
            command += ["--gpu-kv-gb", str(arguments.gpu_kv_gb)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(out.splitlines()[-1])
            rows.append(row)
            print(
                f"{minutes:7g} {row['visual_tokens']:7,} {row['peak_rss_bytes'] / 2**20:8.0f} "
                f"{row['kv_device_peak_bytes'] / row['kv_cap_bytes']:7.0%} {row['overlap']:8.2f} {row['speedup']:8.2f} "
                f"{row['ingest_s']:7.1f}s {row['ttft_s']:7.1f}s {row['followup_ttft_s']:8.2f}s {row['load_s']:6.2f}s",
                flush=True,
            )
            path.unlink()
    about = {
        "command": f"python benchmarks/ingest.py --minutes {' '.join(f'{m:g}' for m in arguments.minutes)} "
        f"--gpu-kv-gb {arguments.gpu_kv_gb:g}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor_name()}, {torch.get_num_threads()} threads, no GPU used",
        "versions": versions("av"),
    }
    report = [{**row, **about} for row in rows]
    if arguments.plot:
        draw(rows, arguments.plot)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
