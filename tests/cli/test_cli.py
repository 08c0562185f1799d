"""The command line: one clear sentence and exit code 2 for bad input, answers alone on stdout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command_line import run
from helpers import PATIENCE_S

from tieredkv.cli import app

BAD = {
    "a missing file": (["gone.mp4", "what ?"], r"gone.mp4: no such file."),
    "a file that is no video": ([__file__, "what ?"], "not a readable video file"),
    "an empty prompt": (["VIDEO", "  "], "the prompt is empty"),
    "a rate of zero": (["VIDEO", "what ?", "--fps", "0"], "fps=0.0 is not valid"),
    "a budget of nothing": (["VIDEO", "what ?", "--gpu-kv-gb", "0"], "gpu_kv_gb=0.0 is not valid"),
    "a budget too small": (["VIDEO", "what ?", "--gpu-kv-gb", "1e-5"], "the smallest that works is"),
    "no frames asked for": (["VIDEO", "what ?", "--max-frames", "0"], "max_frames=0 is not valid"),
    "no pixels asked for": (["VIDEO", "what ?", "--max-pixels", "0x448"], "max_pixels=0 is not valid"),
    "no number of pixels": (
        ["VIDEO", "what ?", "--max-pixels", "448x"],
        "max_pixels='448x' is not valid: give a whole",
    ),
    "no tokens asked for": (["VIDEO", "what ?", "--max-new-tokens", "0"], "max_new_tokens=0 is not valid"),
    "half a character": (["VIDEO", "what \udced\udca0\udcbd"], "half a character ('\\udced' at position 6)"),
    "half a character of a file's name": (["half \ud83d.mp4", "what ?"], "no such file."),
    "half a character of a model's name": (["VIDEO", "what ?", "-m", "\ud83d"], "no usable model found there"),
    "no model there": (["VIDEO", "what ?", "-m", "/nowhere/model"], "no usable model found there"),
}


@pytest.mark.model
@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(monkeypatch, capsys, short_video, arguments, message):
    arguments = [str(short_video) if a == "VIDEO" else a for a in arguments]
    code, out, err = run(monkeypatch, capsys, "ask", "-m", "tiny", *arguments)  # a second -m takes precedence
    assert code == 2
    assert out == ""
    complaint = [line for line in err.splitlines() if line.startswith("tieredkv: ")]
    assert len(complaint) == 1
    assert message in complaint[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("template", [None, "{{ raise_exception('roles must alternate') }}", "{% for %}"])
@pytest.mark.model
def test_a_chat_template_that_is_missing_or_fails_is_one_sentence(monkeypatch, capsys, tmp_path, short_video, template):
    from tieredkv.tiny.model import PATH

    for file in PATH.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    for command in (["ask", str(short_video), "what ?"], ["chat", str(short_video)], ["plan", str(short_video)]):
        code, out, err = run(monkeypatch, capsys, *command, "-m", str(tmp_path))
        assert (code, out) == (2, "")
        assert "has no chat template: copy" in err if template is None else "chat template fails (" in err
        assert len([line for line in err.splitlines() if line.startswith("tieredkv: ")]) == 1


def test_a_model_of_another_family_is_refused_by_name(monkeypatch, capsys, tmp_path, short_video):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    code, out, err = run(monkeypatch, capsys, "ask", str(short_video), "what ?", "-m", str(tmp_path))
    assert (code, out) == (2, "")
    assert "'gpt2' are not supported for video: `tieredkv models` lists those that are." in err


def test_a_type_that_transformers_does_not_know_is_named(monkeypatch, capsys, tmp_path, short_video):
    (tmp_path / "config.json").write_text('{"model_type": "film_reader_9"}')
    code, out, err = run(monkeypatch, capsys, "ask", str(short_video), "what ?", "-m", str(tmp_path))
    assert (code, out) == (2, "")
    assert "does not know models of type 'film_reader_9': `tieredkv models` lists those" in err


@pytest.mark.model
def test_ask_prints_the_answer_alone(monkeypatch, capsys, short_video):
    question = "what colour was the star ?"
    code, out, _ = run(monkeypatch, capsys, "ask", str(short_video), question, "--fps", "4", "--max-new-tokens", "4")
    assert code == 0
    assert out.count("\n") == 1


@pytest.mark.model
def test_ask_as_json_prints_answer_and_statistics(monkeypatch, capsys, short_video):
    arguments = ["ask", str(short_video), "what colour was the star ?", "--json", "--max-new-tokens", "4"]
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    answer = json.loads(out)
    assert {"text", "token_ids", "hit_rate", "kv_device_peak_bytes"} <= answer.keys()


@pytest.mark.model
def test_ask_with_a_session_saves_it_once_and_then_needs_no_video(monkeypatch, capsys, short_video, tmp_path):
    kept, question = tmp_path / "film.tkv", "what colour was the star ?"
    tail = ["--session", str(kept), "--max-new-tokens", "4"]
    code, first, err = run(monkeypatch, capsys, "ask", str(short_video), question, "--fps", "4", *tail)
    assert code == 0
    assert "ingest" in err
    assert kept.exists()
    for arguments in ([question], [str(short_video), question]):
        code, again, err = run(monkeypatch, capsys, "ask", *arguments, *tail)
        assert (code, again) == (0, first)
        assert "ingest" not in err


@pytest.mark.model
def test_bad_use_of_a_session_is_one_sentence(monkeypatch, capsys, short_video, tmp_path):
    kept, question = tmp_path / "film.tkv", "what colour was the star ?"
    run(monkeypatch, capsys, "ask", str(short_video), question, "--session", str(kept), "--max-new-tokens", "1")
    (tmp_path / "cut.tkv").write_bytes(kept.read_bytes()[:-100])
    bad = {
        "no such file; give a video too": [question, "--session", str(tmp_path / "gone.tkv")],
        "another sampling (fps was 2, is 3): leave out --fps": [question, "--session", str(kept), "--fps", "3"],
        "was saved for another video": [str(write_other(tmp_path)), question, "--session", str(kept)],
        "is cut short": [question, "--session", str(tmp_path / "cut.tkv")],
        "is not a tieredkv file": [question, "--session", __file__],
        "there is no folder": [str(short_video), question, "--session", "/nowhere/at/all.tkv"],
        "give a video and a question": [question],
        "files and then one question, in quotes: what: no such file": [str(short_video), "what", "colour"],
        "is a file, and the question is missing: tieredkv ask": [str(short_video)],
    }
    for message, arguments in bad.items():
        code, out, err = run(monkeypatch, capsys, "ask", *arguments)
        assert (code, out) == (2, ""), message
        complaint = [line for line in err.splitlines() if line.startswith("tieredkv: ")]
        assert len(complaint) == 1
        assert message in complaint[0]


def write_other(folder: Path) -> Path:
    from tieredkv.tiny.scene import make_scene
    from tieredkv.tiny.video import write_video

    return write_video(make_scene(1_000_002, 10, 2), folder / "other.mp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0.1"], "--minutes 0.1 is not valid"),
        (["--share", "0"], "--share 0 is not valid"),
        (["--plot", "picture.jpg"], "ends in .png"),
        (["--plot", "/nowhere/at/all/picture.png"], "there is no folder"),
        (["--video", "/nowhere/at/all/film.mp4"], "there is no folder"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_demo_options_are_refused_before_any_work(monkeypatch, capsys, arguments, message):
    code, out, err = run(monkeypatch, capsys, "demo", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tieredkv.demo.run.run", interrupted)
    code, out, err = run(monkeypatch, capsys, "demo")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_version_and_help(monkeypatch, capsys):
    import tieredkv

    assert run(monkeypatch, capsys, "--version")[:2] == (0, f"{tieredkv.__version__}\n")
    code, out, _ = run(monkeypatch, capsys, "demo", "--help")
    assert code == 0
    assert len(out.splitlines()) <= 24
    assert "--plot" in out


COMMANDS = [
    [],
    ["ask"],
    ["chat"],
    ["run"],
    ["plan"],
    ["models"],
    ["policies"],
    ["demo"],
    ["bench"],
    ["serve"],
    ["doctor"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "tieredkv")
def test_help_fits_a_screen_and_shows_an_example(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run(monkeypatch, capsys, *command, "--help")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) <= (80 if command == ["serve"] else 48)  # every setting of a server is an option
    assert max(map(len, lines)) <= 100
    assert "\n  Example: tieredkv " + " ".join(command) in out


def test_every_option_shows_its_default():
    for name, command in typer.main.get_command(app.app).commands.items():  # type: ignore[attr-defined]
        for option in command.params:
            if option.param_type_name == "option" and not option.is_flag and not option.required:
                shown = option.default is not None or re.search(r"\[.+\]", option.help)
                assert shown, f"{name} {option.opts[0]}"


def test_the_help_of_every_command_is_checked():
    names = {command.name for command in app.app.registered_commands}
    assert names == {name for command in COMMANDS for name in command}


@pytest.mark.subprocess
def test_help_imports_nothing_heavy_in_any_command():
    code = """
import sys
from tieredkv import cli
for name in ("", "ask", "chat", "run", "bench", "models", "serve", "doctor"):
    name += " --help"
    sys.argv = ["tieredkv", *name.split()]
    try:
        cli.main()
    except SystemExit:
        pass
print([m for m in ("torch", "transformers", "av", "numpy") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_a_failing_disk_is_one_sentence_and_exit_code_1(monkeypatch, capsys):
    def full(**options):
        raise OSError(28, "No space left on device", "answers.jsonl")

    monkeypatch.setattr("tieredkv.demo.run.run", full)
    code, out, err = run(monkeypatch, capsys, "demo")
    assert (code, out, err) == (1, "", "tieredkv: answers.jsonl: No space left on device.\n")


@pytest.mark.subprocess
def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, tieredkv, tieredkv.cli; print([m for m in ('torch', 'transformers', 'av') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import tieredkv

    for name in tieredkv.__all__:
        assert getattr(tieredkv, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        tieredkv.nonsense  # noqa: B018


@pytest.mark.model
def test_an_answer_is_printed_even_if_the_session_cannot_be_saved(monkeypatch, capsys, short_video, tmp_path):
    from tieredkv.errors import SessionError
    from tieredkv.storage import tensor_file

    def full(*arguments):
        raise SessionError("film.tkv could not be written: No space left on device.")

    monkeypatch.setattr(tensor_file, "write", full)
    arguments = [str(short_video), "what colour was the star ?", "--session", str(tmp_path / "film.tkv")]
    code, out, err = run(monkeypatch, capsys, "ask", *arguments, "--max-new-tokens", "4")
    assert code == 1
    assert out.strip()
    assert err.splitlines()[-1] == "tieredkv: film.tkv could not be written: No space left on device."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "VIDEO", "what ?", "--fps", "1e8"], "fps=100000000.0 is not valid"),
        (["ask", "VIDEO", "what ?", "--start", "1", "--end", "1.00001"], "end=1.00001 is not valid"),
        (["ask", "what ?", "--session", "x" * 300], "not a file name"),
        (["ask", "VIDEO", "what ?", "--session", "x" * 252], "could not be written"),
        (["ask", "VIDEO", "what ?", "--session", "new.tkv", "--max-new-tokens", "0"], "max_new_tokens=0 is not valid"),
        (["plan", "7" * 300], "no such file"),
        (["plan", "VIDEO", "--fps", "1e12"], "is not valid"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_extreme_values_give_one_sentence(monkeypatch, capsys, short_video, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *[str(short_video) if a == "VIDEO" else a for a in arguments])
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("field", "value"), [("num_attention_heads", 0), ("num_hidden_layers", "4")])
def test_a_damaged_config_is_one_sentence(monkeypatch, capsys, tmp_path, field, value):
    from tieredkv.tiny.model import PATH

    config = json.loads((PATH / "config.json").read_text())
    config["text_config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = run(monkeypatch, capsys, "plan", "1000", "-m", str(tmp_path))
    assert (code, out) == (2, "")
    assert "damaged" in err or "no usable model" in err


def test_a_pipe_is_not_waited_for(monkeypatch, capsys, tmp_path):
    import os

    os.mkfifo(tmp_path / "film.mp4")
    code, out, err = run(monkeypatch, capsys, "ask", str(tmp_path / "film.mp4"), "what ?")
    assert (code, out) == (2, "")
    assert "is not a regular file" in err


@pytest.mark.model
def test_a_session_that_appears_during_ingest_is_not_overwritten(monkeypatch, capsys, short_video, tmp_path):
    from tieredkv.session.video_session import VideoSession

    kept, ingest = tmp_path / "film.tkv", VideoSession.ingest

    def slow_ingest(self, *arguments, **options):
        ingest(self, *arguments, **options)
        kept.write_text("of another process")

    monkeypatch.setattr(VideoSession, "ingest", slow_ingest)
    arguments = [str(short_video), "what colour was the star ?", "--session", str(kept), "--max-new-tokens", "2"]
    code, out, err = run(monkeypatch, capsys, "ask", *arguments)
    assert code == 1
    assert out.strip()
    assert "written by another program meanwhile" in err
    assert kept.read_text() == "of another process"


def test_a_number_of_tokens_is_not_sampled(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "plan", "5000", "--fps", "3")
    assert (code, out) == (2, "")
    assert "fps does not apply to a number of tokens" in err


def test_a_share_too_small_for_a_short_demo_is_refused_naming_one_that_works(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "demo", "--minutes", "2")
    assert (code, out) == (2, "")
    assert "give 0.14 or more" in err


@pytest.mark.subprocess
def test_an_interrupt_says_so():
    import signal

    code = """
import signal, sys, types
import tieredkv.cli

def run(**options):
    print("ready", flush=True)
    signal.pause()

sys.modules["tieredkv.demo.run"] = types.SimpleNamespace(run=run)  # the real one imports torch, which is slow
tieredkv.cli.main()
"""
    command = [sys.executable, "-c", code, "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert err.strip().endswith("tieredkv: interrupted.")


@pytest.mark.subprocess
def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "tieredkv", "--version"], capture_output=True, text=True, check=True)
    import tieredkv

    assert done.stdout.strip() == tieredkv.__version__


def test_policies_are_listed_with_their_sources(monkeypatch, capsys):
    from tieredkv.policy.presets import POLICIES

    code, out, _ = run(monkeypatch, capsys, "policies")
    assert code == 0
    for name, policy in POLICIES.items():
        assert f"{name}  ({policy.source})" in out
    code, out, _ = run(monkeypatch, capsys, "policies", "--json")
    assert list(json.loads(out)) == list(POLICIES)


def test_models_are_listed_with_their_layers_and_releases(monkeypatch, capsys):
    from tieredkv.models import families

    code, out, _ = run(monkeypatch, capsys, "models", "--json")
    listed = json.loads(out)
    by_kind = {(row["kind"], name): row for row in listed["models"] for name in row["model_types"]}
    assert code == 0
    assert {name for kind, name in by_kind if kind == "video"} == set(families.VIDEO_FAMILIES)
    assert by_kind["video", "qwen3_5_moe"] == {
        "family": "qwen3_5",
        "kind": "video",
        "model_types": ["qwen3_5", "qwen3_5_moe"],
        "tiered": ["full_attention"],
        "untiered": ["linear_attention"],
        "transformers": ["5.17", "5.24"],
    }
    assert by_kind["text", "gemma3_text"]["untiered"] == ["sliding_attention"]
    assert ("text", "qwen3_vl_text") not in by_kind  # tested as a part of a video model only
    assert listed["refused"] == families.REFUSED


def test_models_and_what_is_refused_are_one_line_each(monkeypatch, capsys):
    from tieredkv.models import families

    code, out, _ = run(monkeypatch, capsys, "models")
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line[:8] != "refused:"}
    assert code == 0
    assert lines["qwen3_5"].split("  ")[0] == "video"
    assert "full_attention; not linear_attention" in lines["qwen3_5"]
    assert lines["llama"].split() == ["text", "llama", "all", "5.17", "to", "5.24"]
    for kind, reason in families.REFUSED.items():
        assert f"refused: {kind}, as {reason}\n" in out


@pytest.mark.subprocess
def test_listing_models_does_not_import_transformers():
    code = """
import sys
from tieredkv import cli
sys.argv = ["tieredkv", "models"]
try:
    cli.main()
except SystemExit:
    print("transformers" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "False"


def test_an_unknown_policy_is_refused_with_the_known_ones(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "plan", "1000", "--gpu-kv-gb", "1", "--policy", "magic")
    assert code == 2
    assert "policy='magic' is not valid: give one of hybridkv, paper" in err
