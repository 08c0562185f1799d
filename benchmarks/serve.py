"""What the server costs, and what its sessions save: the bundled model on this machine, asked through HTTP.

    python benchmarks/serve.py             16 minutes of film; four minutes
    python benchmarks/serve.py --quick     a short film and few requests, as a check that it runs

Starts `tieredkv serve` as a program of its own, uploads a film, and asks about it:

first            the time to the first text of the first question, for which the film is ingested: what every question
                 costs where sessions are not kept
follow-up        the same of later questions (`--rounds` of them, median), and of the same questions to a session of the
                 library in this process, in turn
clients          `--clients` requests at once: how many were answered, and refused because the queue was full
memory           resident bytes of the server before and after `--requests` requests, one after another
idle             processor time of the server while nobody asks, as a share of one core

Prints a table, and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from origin import origin, report  # before torch: it sets how torch's threads wait

# isort: split
import httpx
import psutil
import torch

import tieredkv
from tieredkv.tiny import model as tiny
from tieredkv.tiny.scene import make_scene, questions
from tieredkv.tiny.video import write_video

RESULT = Path(__file__).parent / "results" / "serve-cpu.json"
SEED = 1_700_000
NEW_TOKENS = 8
START_S = 180.0
"""A server must be ready by then."""


@contextmanager
def server(log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server of the bundled model; yields its URL and its process."""
    command = [sys.executable, "-m", "tieredkv", "serve", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIEREDKV_")}
    paths = [str(Path(tieredkv.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with log.open("wb") as file, subprocess.Popen(command, stderr=file, env=environment) as process:
        try:
            end = time.monotonic() + START_S
            while not (found := re.search(r"ready: (http\S+)/", log.read_text())):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server did not start: {log.read_text()}")
                time.sleep(0.1)
            yield found[1], psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def body(film: str, question: str, **fields: Any) -> dict[str, Any]:
    """A request about an uploaded film."""
    parts = [{"type": "video_url", "video_url": {"url": film}}, {"type": "text", "text": question}]
    message = {"role": "user", "content": parts}
    return {"model": "tieredkv-tiny", "messages": [message], "max_completion_tokens": NEW_TOKENS, **fields}


def first_text_s(client: httpx.Client, film: str, question: str) -> float:
    """Seconds from a request to the first text of its answer."""
    began = time.perf_counter()
    first = None
    with client.stream("POST", "/v1/chat/completions", json=body(film, question, stream=True)) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                    first = time.perf_counter() - began
    if first is None:
        raise RuntimeError("the answer has no text")
    return first


def library_first_text_s(session: Any, question: str) -> float:
    """The same of the library."""
    began = time.perf_counter()
    first = None
    for _ in session.ask(question, stream=True, max_new_tokens=NEW_TOKENS):
        first = first or time.perf_counter() - began
    assert first is not None
    return first


async def at_once(url: str, film: str, question: str, count: int) -> list[httpx.Response]:
    """The replies to `count` requests that are sent at the same time."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        requests = [client.post("/v1/chat/completions", json=body(film, question)) for _ in range(count)]
        return await asyncio.gather(*requests)


def resident(process: psutil.Process) -> int:
    """Bytes of the server and of what it started."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def used_s(process: psutil.Process) -> float:
    """Processor time so far."""
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=16.0, help="of film")
    parser.add_argument("--rounds", type=int, default=25, help="follow-up questions, each asked twice")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--idle", type=float, default=10.0, help="seconds to watch the idle server")
    parser.add_argument("--out", type=Path, help=f"also write the result here, as {RESULT} was")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes, arguments.rounds, arguments.requests, arguments.idle = 0.5, 2, 10, 2.0
    seconds = round(60 * arguments.minutes)
    scene = make_scene(SEED, seconds, 12 if seconds > 240 else 4)
    found = dict.fromkeys(one.text for one in questions(scene, SEED, 20 + 2 * arguments.rounds))
    texts = list(found) * (1 + arguments.rounds // len(found))
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(scene, Path(folder) / "film.mp4")
        with (
            server(Path(folder) / "log") as (url, process),
            httpx.Client(base_url=url, timeout=600) as client,
        ):
            with path.open("rb") as file:
                sent = client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("film.mp4", file)})
            film = sent.raise_for_status().json()["id"]
            first = first_text_s(client, film, texts[0])
            model, processor = tiny.load()
            with tieredkv.open_session(model, path, processor=processor, fps=tiny.FPS) as session:
                tokens = session.ask(texts[0], max_new_tokens=1).stats.prompt_tokens
                first_text_s(client, film, texts[0])
                library_first_text_s(session, texts[0])
                through_http, through_library = [], []
                for text in texts[1 : arguments.rounds + 1]:
                    through_http.append(first_text_s(client, film, text))
                    through_library.append(library_first_text_s(session, text))
            replies = asyncio.run(at_once(url, film, texts[0], arguments.clients))
            statuses = Counter(reply.status_code for reply in replies)
            told_when = sum("retry-after" in reply.headers for reply in replies if reply.status_code == 429)
            warm = max(1, arguments.requests // 10)
            memory, began = [resident(process)], time.perf_counter()
            for number in range(warm + arguments.requests):
                question = body(film, texts[number % arguments.rounds])
                client.post("/v1/chat/completions", json=question).raise_for_status()
                if number >= warm - 1 and (number - warm + 1) % warm == 0:
                    memory.append(resident(process))
            request_s = (time.perf_counter() - began) / (warm + arguments.requests)
            time.sleep(1.0)
            before = used_s(process)
            time.sleep(arguments.idle)
            idle = (used_s(process) - before) / arguments.idle
    http, library = statistics.median(through_http), statistics.median(through_library)
    result = {
        "benchmark": "serve",
        **origin("av", "fastapi", "starlette", "uvicorn"),
        "threads": torch.get_num_threads(),
        "minutes": arguments.minutes,
        "prompt_tokens": tokens,
        "first_ms": round(1e3 * first, 1),
        "follow_up_ms": round(1e3 * http, 2),
        "library_ms": round(1e3 * library, 2),
        "added_ms": round(
            1e3 * statistics.median(a - b for a, b in zip(through_http, through_library, strict=True)), 2
        ),
        "times_faster": round(first / http, 1),
        "clients": arguments.clients,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "retry_after": told_when,
        "requests": arguments.requests,
        "request_ms": round(1e3 * request_s, 2),
        "resident_bytes": {"before": memory[0], "warm": memory[1], "middle": memory[6], "after": memory[-1]},
        "idle_share": round(idle, 5),
    }
    mib = {name: f"{value / 2**20:.1f} MiB" for name, value in result["resident_bytes"].items()}
    print(f"{arguments.minutes:g} minutes of film, {tokens:,} tokens")
    print(f"  first question    {result['first_ms']:9.1f} ms to the first text: the film is ingested")
    print(f"  follow-up         {result['follow_up_ms']:9.1f} ms, {result['times_faster']:g} times faster")
    print(f"  by the library    {result['library_ms']:9.1f} ms; HTTP adds {result['added_ms']:g} ms")
    print(f"{arguments.clients} clients at once: {result['statuses']}, Retry-After in {told_when}")
    print(
        f"{arguments.requests} requests, {result['request_ms']:g} ms each: {mib['warm']} before, {mib['after']} after"
    )
    print(f"idle: {idle:.2%} of a core")
    report(result, arguments.out)


if __name__ == "__main__":
    main()
