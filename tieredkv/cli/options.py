"""Options that commands share. Those of `defaults.KEYS` may also be set in the environment or a file."""

from __future__ import annotations

import math
import os
from typing import Annotated, Any

import typer

from tieredkv.errors import OptionError
from tieredkv.video.paths import check_path
from tieredkv.video.timecodes import seconds


def pixels(value: str | int) -> int:
    """A number of pixels: a whole number, or the product that a size such as 448x252 states. Raises `OptionError`."""
    numbers = str(value).lower().split("x")
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise OptionError(f"max_pixels={value!r} is not valid: give a whole number of pixels, or a size as in 448x252.")
    return math.prod(map(int, numbers))


def start_time(value: str | float) -> float:
    """A time of the option `--start`, in seconds. Raises `VideoError`."""
    return seconds("start", value)


def end_time(value: str | float) -> float:
    """A time of the option `--end`, in seconds. Raises `VideoError`."""
    return seconds("end", value)


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="TIEREDKV_MODEL",
        help="A local path, a hub id, or 'tiny', the bundled toy [a session's own; the toy for the demo's films].",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        envvar="TIEREDKV_WEIGHTS",
        metavar="4bit|8bit",
        help="Quantise the decoder's weights while loading [as they are stored].",
    ),
]
GpuGiB = Annotated[
    float | None,
    typer.Option(
        envvar="TIEREDKV_GPU_KV_GB",
        help="Device memory for keys and values, GiB [what the card has left; without one 4].",
    ),
]
HostGiB = Annotated[
    float | None,
    typer.Option(
        envvar="TIEREDKV_HOST_KV_GB", help="Host memory for keys and values, GiB [80 % of what is available]."
    ),
]
HostBits = Annotated[
    int | None,
    typer.Option(
        envvar="TIEREDKV_HOST_KV_BITS",
        metavar="16|8|4",
        help="Bits of keys and values in host memory and session files [16 if all stay on the device, else 8].",
    ),
]
StepOverhead = Annotated[
    float | None,
    typer.Option(
        envvar="TIEREDKV_STEP_OVERHEAD",
        metavar="SHARE",
        help="Longest wait of a step for copies, as a share of the model's own time [0.15].",
    ),
]
Ahead = Annotated[
    bool | None,
    typer.Option(
        "--ahead/--no-ahead",
        envvar="TIEREDKV_AHEAD",
        help="Copy chunks ahead of use [if it pays].",
    ),
]
Fps = Annotated[float | None, typer.Option(envvar="TIEREDKV_FPS", help="Frames sampled per second [the processor's].")]
MaxFrames = Annotated[
    int | None,
    typer.Option(envvar="TIEREDKV_MAX_FRAMES", help="Most frames, evenly spread [no limit]."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        parser=pixels,
        metavar="N|WxH",
        envvar="TIEREDKV_MAX_PIXELS",
        help="Most pixels of a frame that the vision tower sees, such as 112896 or 448x252 [the processor's limits].",
    ),
]
Fit = Annotated[
    bool,
    typer.Option("--fit", envvar="TIEREDKV_FIT", help="Fit rate and frame size, where not given."),
]
Start = Annotated[
    float | None,
    typer.Option(
        parser=start_time,
        metavar="TIME",
        help="Where to start in the video, in seconds or as 1:02:03.5 [its beginning].",
    ),
]
End = Annotated[
    float | None,
    typer.Option(parser=end_time, metavar="TIME", help="Where to end in the video [its end]."),
]
SkipDamaged = Annotated[
    bool, typer.Option("--skip-damaged", help="Go over what is damaged in the video; says which seconds are missing.")
]
AllowUrl = Annotated[
    bool, typer.Option("--allow-url", help="The video may be an http(s) URL: it is downloaded to a temporary file.")
]
System = Annotated[str | None, typer.Option(help="The system prompt; part of a session [the template's own].")]
PolicyName = Annotated[
    str | None,
    typer.Option("--policy", envvar="TIEREDKV_POLICY", help="One of `tieredkv policies` [hybridkv]."),
]
NewTokens = Annotated[int, typer.Option(envvar="TIEREDKV_MAX_NEW_TOKENS", help="Longest answer.")]


Timestamps = Annotated[
    bool, typer.Option("--timestamps", help="Ask for times, where the model is told them, and list those named.")
]


def subtitle_file(value: str) -> str:
    """The absolute path of a subtitle file that is there, or "auto". Raises `VideoError`."""
    if value == "auto":
        return value
    check_path(value)
    return os.path.abspath(value)


Subtitles = Annotated[
    str | None,
    typer.Option(
        parser=subtitle_file,
        metavar="auto|FILE",
        help="Write subtitles between the frames: of an .srt or .vtt file, or the video's own text track [no].",
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def typed(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are on the command line itself, not in the environment or a file."""
    sources = {name: context.get_parameter_source(name) for name in options}
    return {name: options[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def model_path(model: str) -> str:
    """The path or hub id that `--model` names: 'tiny' is the bundled model, a leading ~ is expanded."""
    if model == "tiny":
        from tieredkv.tiny.model import PATH

        return str(PATH)
    return os.path.expanduser(model)
