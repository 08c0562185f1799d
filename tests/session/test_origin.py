"""A session file names its model and how its video was sampled, so that neither has to be given again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tieredkv
from tieredkv.errors import SessionError
from tieredkv.session.origin import ModelSource, check_sampling, model_of, sampling_as_plain, sampling_of
from tieredkv.storage import tensor_file
from tieredkv.tiny.model import PATH
from tieredkv.video.sampling import Sampling

QUESTION = "what colour was the star ?"
FILM = Path("film.tkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the bundled model."""
    return Path(shutil.copytree(PATH, tmp_path_factory.mktemp("models") / "little"))


@pytest.fixture
def saved(folder, frames, tmp_path) -> Path:
    with tieredkv.open_session(folder, frames, fps=4, max_frames=40, start=1, gpu_kv_gb=1) as session:
        session.save(tmp_path / "film.tkv")
    return tmp_path / "film.tkv"


def manifest(sampling: Sampling | None = None, **source: object) -> dict:
    """Of a session file; the film was taken at 2 frames per second."""
    plain: dict = {"session": {"video": {"fps": 2.0}}}
    if sampling is not None:
        plain["sampling"] = sampling_as_plain(sampling)
    return plain | ({"source": source} if source else {})


def test_a_session_is_loaded_with_the_model_it_names(saved, folder):
    assert tensor_file.read(saved).manifest["source"] == {"model": str(folder), "weights": None}
    with tieredkv.load_session(saved) as session, tieredkv.load_session(saved, folder) as given:
        assert session.ask(QUESTION, max_new_tokens=2).token_ids == given.ask(QUESTION, max_new_tokens=2).token_ids


def test_a_session_says_how_its_video_was_sampled(saved, video_model, processor, frames):
    assert tensor_file.read(saved).manifest["sampling"] == {"fps": 4, "max_frames": 40, "start": 1}
    with tieredkv.load_session(saved) as session:
        assert session.sampling == Sampling(fps=4, max_frames=40, start=1)
    with tieredkv.open_session(video_model, frames, processor=processor, gpu_kv_gb=1) as session:
        assert session.sampling == Sampling()


def test_a_model_that_was_moved_is_named_with_its_old_place(saved, folder, tmp_path):
    moved = folder.rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(SessionError, match=rf"film\.tkv was saved with the model at {folder}, where there is no"):
            tieredkv.load_session(saved)
        with tieredkv.load_session(saved, moved) as session:
            session.save(tmp_path / "again.tkv")
        assert tensor_file.read(tmp_path / "again.tkv").manifest["source"]["model"] == str(moved)
    finally:
        moved.rename(folder)


def test_the_folder_that_is_named_may_hold_another_model_by_now(saved, folder, video_model):
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    try:
        video_model.save_pretrained(folder)
        with pytest.raises(SessionError, match=r"was saved with another model \(.*load it with that one"):
            tieredkv.load_session(saved)
    finally:
        weights.write_bytes(kept)
        for name in ("config.json", "generation_config.json"):
            shutil.copy(PATH / name, folder / name)


def test_what_a_file_names_is_kept_when_it_is_saved_again(saved, video_model, processor, frames, tmp_path):
    from tieredkv.models.loading import load

    with tieredkv.load_session(saved) as session:
        session.save(tmp_path / "again.tkv")
    first, again = (tensor_file.read(path).manifest for path in (saved, tmp_path / "again.tkv"))
    assert (first["source"], first["sampling"]) == (again["source"], again["sampling"])
    model, own = load(PATH)
    model.config.name_or_path = model.name_or_path = ""  # as of an object that was built, not loaded
    with tieredkv.load_session(saved, model, processor=own) as session:
        session.save(tmp_path / "again.tkv")
    assert tensor_file.read(tmp_path / "again.tkv").manifest["source"] == first["source"]


def test_a_model_without_a_place_is_not_named(video_model, processor, frames, tmp_path):
    with tieredkv.open_session(video_model, frames, processor=processor, fps=4, gpu_kv_gb=1) as session:
        session.save(tmp_path / "film.tkv")
    assert "source" not in tensor_file.read(tmp_path / "film.tkv").manifest
    with pytest.raises(SessionError, match=r"film\.tkv does not name its model: give it \(-m on the command line"):
        tieredkv.load_session(tmp_path / "film.tkv")
    tieredkv.load_session(tmp_path / "film.tkv", video_model, processor=processor).close()


def test_the_bundled_model_is_named_by_name_and_found_wherever_it_is(frames, tmp_path):
    assert ModelSource.of(PATH) == ModelSource("tiny")
    assert model_of(FILM, manifest(model="tiny", weights=None)).path == str(PATH)


def test_a_relative_folder_is_named_absolutely_and_a_hub_id_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert ModelSource.of("model") == ModelSource(str(tmp_path / "model"))
    assert ModelSource.of("Qwen/Qwen3-VL-4B-Instruct", "4bit") == ModelSource("Qwen/Qwen3-VL-4B-Instruct", "4bit")


@pytest.mark.parametrize(
    "asked", [{}, {"fps": 2}, {"fps": 2.0, "max_frames": 9}, {"start": 0.0}, {"end": 8, "max_pixels": 3136}]
)
def test_the_same_sampling_or_none_passes(asked):
    check_sampling(FILM, manifest(Sampling(fps=2, max_frames=9, end=8.0, max_pixels=3136)), asked)


def test_another_sampling_is_refused_naming_what_differs_with_both_values():
    asked = {"fps": 0.5, "max_frames": 9, "max_pixels": 3136, "end": 60.0}
    with pytest.raises(SessionError) as refusal:
        check_sampling(FILM, manifest(Sampling(fps=2, max_frames=9, end=8)), asked)
    assert str(refusal.value) == (
        "film.tkv was saved with another sampling (fps was 2, is 0.5; max_pixels was not given, is 3136; end was 8, "
        "is 60): leave out --fps, --max-pixels, --end to ask it as it is, or ingest the video again into another file."
    )


def test_the_processors_own_rate_may_be_asked_for_by_number():
    check_sampling(FILM, manifest(Sampling()), {"fps": 2})
    with pytest.raises(SessionError, match="fps was not given, is 3"):
        check_sampling(FILM, manifest(Sampling(max_frames=5)), {"fps": 3})
    with pytest.raises(SessionError, match="fps was 2, is 3"):
        check_sampling(FILM, manifest(Sampling()), {"fps": 3})


def test_a_file_from_before_these_records_asks_for_them(saved, folder, tmp_path):
    stored = tensor_file.read(saved)
    old = {name: part for name, part in stored.manifest.items() if name not in ("source", "sampling")}
    tensor_file.write(tmp_path / "old.tkv", old, {name: stored.tensor(name) for name in stored.names})
    with pytest.raises(SessionError, match="does not name its model"):
        tieredkv.load_session(tmp_path / "old.tkv")
    with tieredkv.load_session(tmp_path / "old.tkv", folder) as session:
        assert session.sampling is None
    check_sampling(FILM, old, {})
    with pytest.raises(SessionError, match=r"film\.tkv does not say how its video was sampled: leave out --fps, --end"):
        check_sampling(FILM, old, {"fps": 4, "end": 5})


def test_a_field_that_a_later_version_adds_is_ignored():
    plain = manifest(Sampling(fps=2))
    plain["sampling"]["added_later"] = 1
    assert sampling_of(FILM, plain) == Sampling(fps=2)


@pytest.mark.parametrize("sampling", ["often", {"fps": "often"}, {"fps": -1}, [1]])
def test_a_sampling_that_is_none_is_refused(saved, folder, tmp_path, sampling):
    stored = tensor_file.read(saved)
    damaged = {**stored.manifest, "sampling": sampling}
    tensor_file.write(tmp_path / "other.tkv", damaged, {name: stored.tensor(name) for name in stored.names})
    with pytest.raises(SessionError, match=r"other\.tkv holds no session"):
        tieredkv.load_session(tmp_path / "other.tkv", folder)


@pytest.mark.subprocess
def test_origins_are_checked_without_torch():
    code = "import sys, tieredkv.session.origin; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
