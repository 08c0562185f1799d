"""tieredkv serve: OpenAI's protocol and a page, on this machine."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from tieredkv.cli.options import (
    Ahead,
    Fps,
    GpuGiB,
    HostBits,
    HostGiB,
    MaxFrames,
    MaxPixels,
    Model,
    NewTokens,
    PolicyName,
    StepOverhead,
    System,
    Weights,
    given,
    model_path,
)
from tieredkv.errors import OptionError

PACKAGES = ("fastapi", "uvicorn", "pydantic", "python_multipart", "httpx", "prometheus_client")
"""Of the extra `serve`."""
KEY = "TIEREDKV_API_KEY"


def serve(
    model: Model = None,
    weights: Weights = None,
    gpu_kv_gb: GpuGiB = None,
    host_kv_gb: HostGiB = None,
    host_kv_bits: HostBits = None,
    step_overhead: StepOverhead = None,
    ahead: Ahead = None,
    policy: PolicyName = None,
    host: Annotated[str, typer.Option(envvar="TIEREDKV_HOST", help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="TIEREDKV_PORT", help="Its port; 0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A key that clients must send; several may be given. Other users of this machine see it here: better "
            f"set {KEY}, or use --api-key-file [none is needed].",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(envvar="TIEREDKV_API_KEY_FILE", help="A file with a key a line [none]."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let other machines in without a key.")] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which clients call this server, as behind a proxy; several may be given [none]."),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(envvar="TIEREDKV_VIDEOS", help="The folder below which requests may name files [none]."),
    ] = None,
    sessions: Annotated[
        Path | None,
        typer.Option(envvar="TIEREDKV_SESSIONS", help="The folder in which sessions outlive the server [none]."),
    ] = None,
    sessions_gb: Annotated[
        float, typer.Option(envvar="TIEREDKV_SESSIONS_GB", help="Most that this folder may take, GiB.")
    ] = 50.0,
    open_gb: Annotated[
        float | None,
        typer.Option(
            envvar="TIEREDKV_OPEN_GB", help="Most host memory of all open sessions together, GiB [as --host-kv-gb]."
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(envvar="TIEREDKV_QUEUE", help="Requests that may wait; one more is refused with 429.")
    ] = 32,
    timeout: Annotated[
        float,
        typer.Option(
            envvar="TIEREDKV_TIMEOUT",
            help="Seconds for a request once its films are there: waiting, reading, answering.",
        ),
    ] = 600.0,
    grace: Annotated[
        float, typer.Option(envvar="TIEREDKV_GRACE", help="Seconds for what runs when the server is stopped.")
    ] = 30.0,
    fetch_from: Annotated[
        list[str] | None,
        typer.Option(help="A host to fetch films from: name, *.name or name:port; several may be given [none]."),
    ] = None,
    allow_any_host: Annotated[
        bool, typer.Option("--allow-any-host", help="Fetch films from any host with a public address.")
    ] = False,
    upload_gb: Annotated[
        float, typer.Option(envvar="TIEREDKV_UPLOAD_GB", help="Largest film that is uploaded or fetched, GiB.")
    ] = 4.0,
    uploads_gb: Annotated[
        float, typer.Option(envvar="TIEREDKV_UPLOADS_GB", help="Most disk space of all of them, GiB.")
    ] = 20.0,
    body_mb: Annotated[
        float, typer.Option(envvar="TIEREDKV_BODY_MB", help="Largest request in JSON, MiB; data: URLs are in it.")
    ] = 64.0,
    video_hours: Annotated[float, typer.Option(envvar="TIEREDKV_VIDEO_HOURS", help="Longest film.")] = 12.0,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    max_pixels: MaxPixels = None,
    system: System = None,
    max_new_tokens: NewTokens = 512,
    log_level: Annotated[
        str, typer.Option(envvar="TIEREDKV_LOG_LEVEL", metavar="debug|info|warning|error", help="What is logged.")
    ] = "info",
) -> None:
    """Serve OpenAI's protocol and a page on which films are asked about. Needs the extra `serve`.

    Without -m the bundled toy model answers, about the demo's film. Options of films hold for requests that do not say.
    Ctrl-C stops it: what runs is finished within --grace; a second one ends that, too.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise OptionError(f'serve needs {" and ".join(missing)}: pip install "tieredkv[serve]".')
    from tieredkv.cli.checks import check_options
    from tieredkv.cli.opening import check_model
    from tieredkv.models.prompts import check_system
    from tieredkv.serve.address import bound
    from tieredkv.serve.logs import LEVELS
    from tieredkv.serve.settings import Settings

    if log_level not in LEVELS:
        raise OptionError(f"log_level={log_level!r} is not valid: give one of {', '.join(LEVELS)}.")
    tiers: dict[str, Any] = given(
        gpu_kv_gb=gpu_kv_gb,
        host_kv_gb=host_kv_gb,
        host_kv_bits=host_kv_bits,
        policy=policy,
        step_overhead=step_overhead,
        ahead=ahead,
    )
    check_options(tiers, given(fps=fps, max_frames=max_frames, max_pixels=max_pixels), max_new_tokens)
    check_system(system)
    settings = Settings(
        model=None if model in (None, "tiny") else model_path(str(model)),
        weights=weights,
        tiers=tiers,
        host=host,
        port=port,
        api_keys=keys(api_key or [], api_key_file),
        insecure=insecure,
        allowed_hosts=tuple(allowed_host or ()),
        videos=videos,
        sessions=sessions,
        sessions_gb=sessions_gb,
        open_gb=open_gb,
        queue=queue,
        timeout=timeout,
        grace=grace,
        hosts=tuple(fetch_from or ()),
        any_host=allow_any_host,
        upload_gb=upload_gb,
        uploads_gb=uploads_gb,
        body_mb=body_mb,
        video_hours=video_hours,
        max_new_tokens=max_new_tokens,
        system=system,
        fps=fps,
        max_frames=max_frames,
        max_pixels=max_pixels,
    ).check()
    check_model(model, weights)
    listener = bound(host, port)
    from tieredkv.cli.process import quick_imports

    with listener:
        with quick_imports():
            from tieredkv.serve.running import run
        raise typer.Exit(run(settings, listener, log_level))


def keys(on_line: list[str], file: Path | None) -> tuple[str, ...]:
    """All API keys: of the command line, a file and the environment. Raises `OptionError` for a file without one."""
    found = [*on_line, *filter(None, [os.environ.get(KEY)])]
    if file is not None:
        try:
            in_file = file.read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise OptionError(f"--api-key-file {file} cannot be read: {why}.") from None
        if not in_file:
            raise OptionError(f"--api-key-file {file} holds no key: write one into it.")
        found += in_file
    return tuple(dict.fromkeys(found))


def add_to(app: typer.Typer) -> None:
    app.command("serve", epilog="Example: tieredkv serve -m Qwen/Qwen2.5-VL-3B-Instruct --sessions sessions")(serve)
