"""What a session file says of its origin: the model that it was saved with, and how the video was sampled.

Imports no torch: a session can be refused for its origin before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tieredkv.errors import SessionError
from tieredkv.tiny.model import PATH as BUNDLED_PATH
from tieredkv.video.sampling import Sampling

BUNDLED = "tiny"
"""Names the bundled model, wherever the package is installed."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model can be loaded from."""

    model: str
    """A hub id, an absolute path, or `BUNDLED`."""
    weights: str | None = None
    """How the weights were quantised while loading, "4bit" or "8bit"; None: as they are stored."""

    @staticmethod
    def of(model: Any, weights: str | None = None) -> ModelSource | None:
        """Of a path, a hub id, or a model object; None for an object that was not loaded from anywhere."""
        name = str(model) if isinstance(model, str | Path) else getattr(model, "name_or_path", None)
        if not isinstance(name, str) or not name:
            return None
        folder = Path(name)
        if not folder.is_dir():
            return ModelSource(name, weights)
        same = folder.resolve() == BUNDLED_PATH.resolve()
        return ModelSource(BUNDLED if same else str(folder.absolute()), weights)

    @property
    def path(self) -> str:
        """What `load` takes."""
        return str(BUNDLED_PATH) if self.model == BUNDLED else self.model

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def model_of(path: Path, manifest: Mapping[str, Any]) -> ModelSource:
    """The model that a session file names. Raises `SessionError` if it names none, or one whose folder is gone."""
    source = named_model(manifest)
    if source is None:
        raise SessionError(f"{path} does not name its model: give it (-m on the command line, model= in Python).")
    folder = Path(source.path)
    if folder.is_absolute() and not folder.is_dir():
        raise SessionError(
            f"{path} was saved with the model at {folder}, where there is no folder now: give the one where it is "
            "(-m on the command line, model= in Python)."
        )
    return source


def weights_of(path: Path, manifest: Mapping[str, Any], asked: str | None) -> str | None:
    """How to quantise the weights while loading the model of a session file. Raises `SessionError` if `asked` is given
    and differs. Of a file that names no model it is what was asked."""
    named = named_model(manifest)
    if named is None:
        return asked
    if asked is not None and asked != named.weights:
        saved = f"weights={named.weights!r}" if named.weights else "weights as they are stored"
        raise SessionError(f"{path} was saved with {saved}: leave out weights={asked!r}.")
    return named.weights


def named_again(manifest: Mapping[str, Any], given: ModelSource | None) -> ModelSource | None:
    """What to name when a session is saved again that was loaded with the model of `given`: its place, if it moved.

    An object does not say how its weights were quantised, and may not say where it is from; the file may.
    """
    named = named_model(manifest)
    return named if named is not None and (given is None or given.model == named.model) else given


def named_model(manifest: Mapping[str, Any]) -> ModelSource | None:
    """The model that a session file names; None if the file is older than this, or its model was from nowhere."""
    plain = manifest.get("source")
    if not isinstance(plain, dict) or not isinstance(plain.get("model"), str):
        return None
    return ModelSource(plain["model"], plain.get("weights"))


def sampling_as_plain(sampling: Sampling) -> dict[str, Any]:
    """For JSON: the values that are neither None nor False."""
    return {name: value for name, value in asdict(sampling).items() if value is not None and value is not False}


def sampling_of(path: Path, manifest: Mapping[str, Any]) -> Sampling | None:
    """How the video of a session file was sampled; None if the file is older than this record.

    Fields that a later version has added are ignored. Raises `SessionError` for a record that is no sampling.
    """
    plain = manifest.get("sampling")
    if plain is None:
        return None
    known = {field.name for field in fields(Sampling)}
    try:
        return Sampling(**{name: value for name, value in plain.items() if name in known})
    except (AttributeError, TypeError, ValueError):
        raise SessionError(f"{path} holds no session (its sampling is {plain!r}).") from None


def check_sampling(path: Path, manifest: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise `SessionError` unless the video was sampled with these options; the message names those that differ.

    asked: fields of `Sampling`. A rate equals the processor's own if that is what it was; a video that is cached fits;
    of two subtitle files the cues count, not the names.
    """
    asked = {name: value for name, value in asked.items() if name != "fit"}
    if not asked:
        return
    sampling = sampling_of(path, manifest)
    if sampling is None:
        raise SessionError(
            f"{path} does not say how its video was sampled: leave out {', '.join(map(_option, asked))}."
        )
    saved = {name: getattr(sampling, name) for name in asked}
    if "fps" in saved and saved["fps"] is None and sampling.max_frames is None:
        saved["fps"] = manifest["session"]["video"]["fps"]
    same_cues = same_subtitles(manifest, saved.get("subtitles"), asked.get("subtitles"))
    if same_cues is not None:
        saved["subtitles"] = asked["subtitles"]
    different = [name for name in asked if asked[name] != saved[name]]
    if same_cues is False and not different:
        raise SessionError(
            f"{path} was saved with other subtitles than are in {asked['subtitles']} now: leave out --subtitles to ask "
            "it as it is, or ingest the video again into another file."
        )
    if different:
        changes = "; ".join(f"{name} was {_value(saved[name])}, is {_value(asked[name])}" for name in different)
        options = ", ".join(map(_option, different))
        raise SessionError(
            f"{path} was saved with another sampling ({changes}): leave out {options} to ask it as it is, or ingest "
            "the video again into another file."
        )


def same_subtitles(manifest: Mapping[str, Any], saved: str | None, asked: str | None) -> bool | None:
    """Whether a subtitle file holds the cues that were written between the frames; None unless both are files.

    saved, asked: `Sampling.subtitles`.
    """
    if saved is None or asked is None:
        return None
    from tieredkv.video.subtitles import AUTO, read_cues, shown_during, subtitles_hash  # imports PyAV

    facts = manifest["session"]["video"]
    if AUTO in (saved, asked) or facts["seconds"] is None:
        return None
    cues = shown_during(read_cues(asked), facts["start"], facts["start"] + facts["seconds"])
    return subtitles_hash(cues) == facts.get("subtitles")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value(value: Any) -> str:
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) else str(value)
