"""tieredkv chat, on the bundled model: what is typed, what is answered, and how an answer is stopped."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from helpers import PATIENCE_S

import tieredkv
from tieredkv.cli.talk import Talk
from tieredkv.errors import SessionError
from tieredkv.session.conversation_file import one_chat
from tieredkv.session.video_session import VideoSession
from tieredkv.tiny import model as tiny

pytestmark = pytest.mark.model

MOON, CUP, FOLLOW = "what colour was the moon ?", "what colour was the cup ?", "follow the moon for 3 ?"


@pytest.fixture(scope="module")
def session(short_video):
    with tieredkv.open_session(tiny.PATH, short_video, fps=4) as session:
        yield session


@pytest.fixture
def talk(session):
    session.clear_history()
    return Talk(session, {"max_new_tokens": 16})


def piped(monkeypatch, capsys, text: str, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return run(monkeypatch, capsys, "chat", *arguments)


def test_from_a_pipe_only_answers_are_printed_and_each_is_that_of_chat(monkeypatch, capsys, short_video, session):
    session.clear_history()
    expected = [session.chat(question).text for question in (MOON, FOLLOW, CUP)]
    assert len(expected[1].split()) > 1
    text = f"{MOON}\n\n{FOLLOW}\n{CUP}"
    code, out, err = piped(monkeypatch, capsys, text, str(short_video), "--fps", "4")
    assert code == 0
    assert out.splitlines() == expected
    assert "> " not in err


def test_as_json_each_answer_is_one_object(monkeypatch, capsys, short_video):
    code, out, _ = piped(monkeypatch, capsys, f"{MOON}\n{CUP}\n", str(short_video), "--fps", "4", "--json")
    assert code == 0
    objects = [json.loads(line) for line in out.splitlines()]
    assert [{"text", "token_ids", "evidence", "hit_rate"} <= row.keys() for row in objects] == [True, True]
    assert {"start", "end", "weight", "peak"} <= objects[0]["evidence"][0].keys()


def test_a_question_that_fails_says_why_in_one_line_and_the_next_is_answered(monkeypatch, capsys, short_video):
    text = f"what is <|video_pad|> ?\n{MOON}\n"
    code, out, err = piped(monkeypatch, capsys, text, str(short_video), "-m", "tiny", "--fps", "4")
    assert code == 1
    assert len(out.splitlines()) == 1
    assert [line for line in err.splitlines() if line.startswith("tieredkv: ")] == [
        "tieredkv: the prompt contains '<|video_pad|>', which stands for the video: leave it out."
    ]


def test_an_error_of_torch_is_one_line_with_its_kind(talk, monkeypatch, capsys):
    def out_of_memory(*arguments, **options):
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(talk.session, "chat", out_of_memory)
    talk.run([MOON])
    assert capsys.readouterr() == ("", "tieredkv: RuntimeError: CUDA out of memory.\n")
    assert talk.failed == 1


def test_words_are_written_as_they_are_generated(talk, monkeypatch):
    writes: list[str] = []
    monkeypatch.setattr(sys, "stdout", writer := io.StringIO())
    monkeypatch.setattr(writer, "write", writes.append)
    talk.run([FOLLOW])
    words = [piece for piece in writes if piece]
    assert len(words) > 2
    assert "".join(words) == f"{talk.session.history[-1][1]}\n"


class Interrupt:
    """A logits processor that presses Ctrl-C when the third token of its first answer is due."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return scores


def test_an_interrupt_stops_the_answer_and_the_conversation_continues(talk, capsys):
    before = signal.getsignal(signal.SIGINT)
    talk.run([FOLLOW])
    whole = capsys.readouterr().out
    talk.session.clear_history()
    talk.options["logits_processor"] = [Interrupt()]
    talk.run([FOLLOW, FOLLOW])
    out, err = capsys.readouterr()
    stopped, again = out.splitlines()
    assert 0 < len(stopped.split()) < len(again.split())
    assert whole == f"{again}\n"
    assert again.startswith(stopped)
    assert "stopped" in err
    assert [question for question, _ in talk.session.history] == [FOLLOW]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_acts_at_once(talk):
    class Twice:
        def __call__(self, input_ids, scores):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return scores

    talk.options["logits_processor"] = [Twice()]
    with pytest.raises(KeyboardInterrupt):
        talk.run([FOLLOW])


def test_clear_starts_a_new_conversation(talk):
    talk.run([MOON, "/clear", CUP])
    assert [question for question, _ in talk.session.history] == [CUP]


def test_lines_after_quit_are_not_read(talk):
    talk.run([MOON, "/quit", CUP])
    assert [question for question, _ in talk.session.history] == [MOON]


def test_stats_are_of_the_last_answer(talk, capsys):
    talk.run(["/stats", MOON, "/stats"])
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "nothing has been answered yet."
    stats = dict(line.split(maxsplit=1) for line in err[1:])
    assert stats["answer"].startswith("2 tokens, the first after 0.")
    assert stats["device"].endswith(" MiB for keys and values, of 4 GiB allowed")
    assert stats["decoding"] == "eager"


def test_an_answer_that_nobody_reads_ends_the_conversation(talk, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        talk.run([MOON, CUP])
    assert talk.session.history == ()


@pytest.mark.parametrize("line", ["/nonsense", "/stats now", "/"])
def test_an_unknown_command_is_not_taken_for_a_question(talk, capsys, line):
    talk.run([line])
    assert capsys.readouterr() == ("", f"tieredkv: {line} is not a command: /help lists them.\n")
    assert talk.session.history == ()


def test_help_names_every_command(talk, capsys):
    talk.run(["/help"])
    assert {line.split()[0] for line in capsys.readouterr().err.splitlines()} == {"/clear", "/save", "/stats", "/quit"}


def test_a_conversation_is_saved_and_continued(monkeypatch, capsys, short_video, tmp_path):
    kept = tmp_path / "film.tkv"
    arguments = ["--session", str(kept)]
    code, _, _ = piped(monkeypatch, capsys, f"{MOON}\n/save\n", str(short_video), "--fps", "4", *arguments)
    assert code == 0
    code, out, err = piped(monkeypatch, capsys, f"{CUP}\n/save {tmp_path}/two words.tkv\n", *arguments)
    assert code == 0
    assert "ingest" not in err
    with tieredkv.load_session(tmp_path / "two words.tkv", tiny.PATH) as session:
        assert [question for question, _ in session.history] == [MOON, CUP]
        assert session.history[1][1] == out.strip()


def test_saving_never_replaces_a_file_that_is_not_a_session(talk, capsys, tmp_path):
    film = tmp_path / "film.mp4"
    film.write_text("precious")
    talk.run([f"/save {film}", "/save", "/save /nowhere/at/all.tkv"])
    assert film.read_text() == "precious"
    assert talk.failed == 3
    first, second, third = capsys.readouterr().err.splitlines()
    assert "exists and is not a session: it is not overwritten" in first
    assert "there is no file to save to: give one" in second
    assert "there is no folder" in third


@pytest.mark.parametrize("line", [b"what \xff ?", b"what \xed\xa0\xbd ?", "what ?".encode("utf-16-le")])
def test_a_line_that_is_not_text_does_not_affect_the_others(monkeypatch, capsys, short_video, line):
    good = MOON.encode()
    stdin = io.TextIOWrapper(io.BytesIO(b"\n".join([good, line, good, b""])), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = run(monkeypatch, capsys, "chat", str(short_video), "-m", "tiny", "--fps", "4")
    assert (code, len(out.splitlines())) == (1, 2)
    assert err.count("tieredkv: ") == 1
    assert "tieredkv: the prompt contains " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no video to ask about"),
        (["gone.mp4"], "gone.mp4: no such file"),
        (["VIDEO", "--max-new-tokens", "0"], "max_new_tokens=0 is not valid"),
        (["VIDEO", "--session", "/nowhere/at/all.tkv"], "there is no folder"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input_is_one_sentence(monkeypatch, capsys, short_video, arguments, message):
    code, out, err = piped(monkeypatch, capsys, "", *[str(short_video) if a == "VIDEO" else a for a in arguments])
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.subprocess
def test_at_a_terminal_there_is_a_prompt_and_a_history_and_ctrl_d_leaves(short_video, tmp_path):
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    environment["PYTHONPATH"] = str(Path(tieredkv.__file__).parents[1])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tieredkv", "chat", str(short_video), "--fps", "4"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        os.close(theirs)
        read_until(ours, b"> ")
        os.write(ours, MOON.encode() + b"\n")
        answered = read_until(ours, b"> ")
        os.write(ours, b"half a lin")
        read_until(ours, b"half a lin")  # as a line editor shows it
        for _ in range(PATIENCE_S):  # a signal just before the line editor waits is not noticed
            process.send_signal(signal.SIGINT)
            if select.select([ours], [], [], 1)[0]:
                break
        read_until(ours, b"> ")
        os.write(ours, b"\x04")
        _, err = process.communicate(timeout=PATIENCE_S)
    os.close(ours)
    assert process.returncode == 0, err
    with tieredkv.open_session(tiny.PATH, short_video, fps=4) as session:
        assert session.ask(MOON).text in answered.decode()
    assert (tmp_path / "tieredkv" / "history").read_text().splitlines()[-1] == MOON
    assert b"visual tokens. Ask, or /help." in err


def read_until(descriptor: int, end: bytes) -> bytes:
    """What a terminal shows up to this, at its end."""
    shown = b""
    while not shown.endswith(end):
        assert select.select([descriptor], [], [], PATIENCE_S)[0], f"a terminal shows no more than {shown!r}"
        shown += os.read(descriptor, 1024)
    return shown


# The conversation at the end


class Ending(io.StringIO):
    """Standard input that ends with an exception or a signal instead of its end."""

    def __init__(self, text: str, end: signal.Signals | None = None) -> None:
        super().__init__(text)
        self.end = end

    def __iter__(self):
        yield from iter(self.readline, "")
        if self.end is not None:
            os.kill(os.getpid(), self.end)
            signal.pause()


@pytest.fixture(scope="module")
def kept(short_video, tmp_path_factory):
    """The file of a session with a conversation."""
    path = tmp_path_factory.mktemp("kept") / "film.tkv"
    with tieredkv.open_session(tiny.PATH, short_video, fps=4) as session:
        session.chat(MOON, max_new_tokens=2)
        session.save(path)
    return path


@pytest.fixture
def film(kept, tmp_path):
    return Path(shutil.copy(kept, tmp_path))


def history(path: Path) -> list[str]:
    with tieredkv.load_session(path) as session:
        return [question for question, _ in session.history]


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        (f"{CUP}\n", None, 0),
        (f"{CUP}\n/quit\n", None, 0),
        (f"{CUP}\n", signal.SIGINT, 130),
        (f"{CUP}\n", signal.SIGTERM, 128 + signal.SIGTERM),
        (f"{CUP}\n", signal.SIGHUP, 128 + signal.SIGHUP),
    ],
    ids=["end of file", "quit", "interrupt", "SIGTERM", "SIGHUP"],
)
def test_the_conversation_is_kept_however_the_chat_ends(monkeypatch, capsys, film, text, end, expected):
    before, handlers = (
        (film.stat().st_ino, film.stat().st_mtime_ns),
        [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)],
    )
    if end is not None and signal.getsignal(end) is signal.SIG_IGN:
        pytest.skip(f"{end.name} is ignored here, as under nohup")
    monkeypatch.setattr(sys, "stdin", Ending(text, end))
    code, _, err = run(monkeypatch, capsys, "chat", "--session", str(film))
    assert code == expected
    assert f"{film}: the conversation is kept." in err
    assert history(film) == [MOON, CUP]
    assert (film.stat().st_ino, film.stat().st_mtime_ns) == before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_an_interrupt_while_answering_keeps_the_turns_before(monkeypatch, capsys, film):
    chat = VideoSession.chat

    def interrupted(self, question, **options):
        if question == FOLLOW:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # a second one acts at once
        return chat(self, question, **options)

    monkeypatch.setattr(VideoSession, "chat", interrupted)
    code, _, _ = piped(monkeypatch, capsys, f"{CUP}\n{FOLLOW}\n{MOON}\n", "--session", str(film))
    assert code == 130
    assert history(film) == [MOON, CUP]


def test_of_two_chats_on_one_session_the_second_is_refused_at_once(monkeypatch, capsys, film):
    with one_chat(film):
        code, out, err = piped(monkeypatch, capsys, f"{CUP}\n", "--session", str(film))
    assert (code, out) == (2, "")
    assert err.endswith(
        f"tieredkv: {film} is in use by another chat: end that one first, or copy the file and give the copy.\n"
    )
    assert "loading the model" not in err
    assert piped(monkeypatch, capsys, f"{CUP}\n", "--session", str(film))[0] == 0
    assert history(film) == [MOON, CUP]
    assert [path.name for path in film.parent.iterdir() if path.suffix != ".chat"] == ["film.tkv"]


@pytest.mark.parametrize("new", [False, True], ids=["continued", "new"])
def test_a_chat_keeps_others_out_until_it_ends(monkeypatch, capsys, film, short_video, tmp_path, new):
    path = tmp_path / "new.tkv" if new else film
    chat, refused = VideoSession.chat, []

    def meanwhile(self, question, **options):
        with pytest.raises(SessionError, match="in use by another chat"), one_chat(path):
            pass
        refused.append(question)
        return chat(self, question, **options)

    monkeypatch.setattr(VideoSession, "chat", meanwhile)
    assert piped(monkeypatch, capsys, f"{CUP}\n", *[str(short_video)] * new, "--session", str(path))[0] == 0
    assert refused == [CUP]
    with one_chat(path):
        pass


def test_without_a_change_nothing_is_written(monkeypatch, capsys, film):
    code, _, err = piped(monkeypatch, capsys, "/help\n", "--session", str(film))
    assert (code, [path.name for path in film.parent.iterdir()]) == (0, ["film.tkv"])
    assert "the conversation is kept" not in err


def test_a_cleared_conversation_stays_cleared(monkeypatch, capsys, film):
    assert piped(monkeypatch, capsys, "/clear\n", "--session", str(film))[0] == 0
    assert history(film) == []


def test_a_new_session_keeps_its_first_conversation(monkeypatch, capsys, short_video, tmp_path):
    path = tmp_path / "new.tkv"
    assert piped(monkeypatch, capsys, f"{MOON}\n", str(short_video), "--session", str(path))[0] == 0
    assert history(path) == [MOON]


def test_a_conversation_that_cannot_be_kept_is_said_and_gives_exit_code_1(monkeypatch, capsys, film):
    from tieredkv.storage import atomic

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    code, out, err = piped(monkeypatch, capsys, f"{CUP}\n", "--session", str(film))
    assert code == 1
    assert out.strip()
    assert err.splitlines()[-1] == f"tieredkv: {film}.chat could not be written: No space left on device."
    assert history(film) == [MOON]
