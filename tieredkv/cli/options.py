"""Options that commands share. Each may also be set in the environment or in the file of `defaults`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", envvar="TIEREDKV_MODEL", help="A local path, a hub id, or 'tiny'.")
]
GpuGiB = Annotated[
    float | None, typer.Option(envvar="TIEREDKV_GPU_KV_GB", help="Device memory for keys and values, GiB [4].")
]
HostGiB = Annotated[
    float | None, typer.Option(envvar="TIEREDKV_HOST_KV_GB", help="Host memory for keys and values, GiB.")
]
Fps = Annotated[float | None, typer.Option(envvar="TIEREDKV_FPS", help="Frames sampled per second.")]
MaxFrames = Annotated[int | None, typer.Option(envvar="TIEREDKV_MAX_FRAMES", help="Spread at most this many frames.")]
Start = Annotated[float | None, typer.Option(help="Second of the video to start at.")]
End = Annotated[float | None, typer.Option(help="Second of the video to end at.")]
PolicyName = Annotated[
    str | None,
    typer.Option("--policy", envvar="TIEREDKV_POLICY", help="One of `tieredkv policies` [hybridkv]."),
]
NewTokens = Annotated[int, typer.Option(envvar="TIEREDKV_MAX_NEW_TOKENS", help="Longest answer, in tokens.")]


def given(**options: Any) -> dict[str, Any]:
    """Those of the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def typed(context: typer.Context, options: dict[str, Any]) -> list[str]:
    """Those of the options that stand on the command line itself, as they are written there."""
    sources = {name: context.get_parameter_source(name) for name in options}
    return [
        f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"
    ]


def model_path(model: str) -> str:
    """What `--model` names: the bundled model's folder for 'tiny', else as it is, a leading ~ expanded."""
    if model == "tiny":
        from tieredkv.tiny.model import PATH

        return str(PATH)
    return os.path.expanduser(model)
