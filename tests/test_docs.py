"""What README and docs show runs as shown.

A fenced block is Python, or commands; a diagram is fenced as text. One that cannot run here has `<!-- not run: WHY -->`
on the line before, and is listed below. The bundled model and a generated film replace those that the pages name.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from command_line import run
from helpers import tier_options
from test_architecture import ALLOWED

import tieredkv
from tieredkv.cli import app
from tieredkv.environment.versions import cache_argument
from tieredkv.tiny import model as tiny
from tieredkv.tiny.scene import make_scene
from tieredkv.tiny.video import write_video

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
USING = (ROOT / "docs" / "using.md").read_text()
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
COMMANDS = "docs/command-line.md"
"""Run as one, by a test below."""
NOT_RUN = {
    ("README.md", "make demo"),
    ("README.md", "make test"),
    ("CONTRIBUTING.md", "make test"),
    ("README.md", 'pip install "tieredkv[serve]"'),
    ("docs/serving.md", "from openai import OpenAI"),
    ("docs/index.md", "pip install ."),
    ("docs/tiny-model.md", "python -m tieredkv.tiny.train --out tiny-model"),
    ("docs/tiny-model.md", "python -m tieredkv.tiny.evaluate --positions next --scenes 40"),
    ("docs/tiny-model.md", "python -m tieredkv.tiny.train --architecture qwen3_5 --out tiny-hybrid"),
    ("docs/tiny-model.md", "python -m tieredkv.tiny.evaluate --weights benchmarks/weights/tiny-qwen3_5"),
}
"""Page and first command of every block that is shown and not run."""
INSIDE = ("architecture", "evidence", "ingest", "inside-transformers", "memory-and-cap", "retrieval", "sessions")
"""Pages that say which function does what."""
TESTED_ALONE = ("scene.tkv", "loud.py")
"""In blocks that a test below runs, and looks at what they print."""
MODELS = re.compile(r"PATH_OR_HUB_ID|Qwen/[\w.-]+")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    why_not: str | None

    @property
    def first(self) -> str:
        """Its first line, without a comment."""
        return self.text.splitlines()[0].split("#")[0].strip()


def blocks_of(page: str) -> list[Block]:
    found, lines = [], iter(enumerate((ROOT / page).read_text().splitlines(), 1))
    before = ""
    for number, line in lines:
        if fence := re.fullmatch(r"```(\w*)", line):
            inside = []
            for _, text in lines:
                if text == "```":
                    break
                inside.append(text)
            why_not = re.fullmatch(r"<!-- not run: (.+) -->", before)
            found.append(Block(page, number, fence[1], "\n".join(inside), why_not and why_not[1]))
        before = line
    return found


BLOCKS = [block for page in PAGES if page != COMMANDS for block in blocks_of(page) if block.language != "text"]
TO_RUN = [block for block in BLOCKS if block.why_not is None and not any(name in block.text for name in TESTED_ALONE)]


def test_only_these_blocks_are_not_run():
    assert {(block.page, block.first) for block in BLOCKS if block.why_not is not None} == NOT_RUN
    assert {block.language for block in BLOCKS} <= {"", "bash", "python"}


@pytest.fixture(scope="module")
def a_film(tmp_path_factory) -> Path:
    return write_video(make_scene(1_000_004, 30, 4), tmp_path_factory.mktemp("film") / "film.mp4")


@pytest.fixture
def film(a_film, tmp_path, monkeypatch) -> Path:
    """Working directory with a film and questions about it; standard input is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "questions.jsonl").write_text('{"video": "film.mp4", "question": "what colour was the moon ?"}\n')
    return Path(shutil.copy(a_film, tmp_path / "film.mp4"))


@pytest.mark.model
@pytest.mark.parametrize("block", TO_RUN, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_runs(block, film, monkeypatch, request):
    text = MODELS.sub(str(tiny.PATH), block.text)
    if block.language == "python":
        names: dict = {"tieredkv": tieredkv, "model": str(tiny.PATH)}
        if "input_ids" in text:
            llama = request.getfixturevalue("llama")
            names |= {"model": llama, "input_ids": request.getfixturevalue("prompt_ids")}
        exec(compile(text, block.page, "exec"), names)
        return
    for line in text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "tieredkv", f"no way to run {program!r}"
        monkeypatch.setattr(sys, "argv", ["tieredkv", *arguments])
        with pytest.raises(SystemExit) as stop:
            app.execute()
        assert not stop.value.code or arguments[0] == "doctor", line  # doctor may find a problem


@pytest.mark.parametrize("page", sorted({*PAGES} - {"docs/log.md"}))  # the log names what is gone, too
def test_commands_within_the_text_name_what_exists(page):
    commands, empty = typer.main.get_command(app.app).commands, SimpleNamespace(params=[])  # type: ignore[attr-defined]
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(
        r"`((?:python|tieredkv|make|\.venv/bin/\w+) [^`]+)`", (ROOT / page).read_text().replace("\n", " ")
    ):
        program, *words = shlex.split(command)
        if program.endswith("tieredkv"):
            options = {"--help", *(name for one in commands.get(words[0], empty).params for name in one.opts)}
            assert {word for word in words if word.startswith("-")} <= options, command
        elif program == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), command
        elif words[0] == "-m" and words[1].startswith("tieredkv"):
            assert (ROOT / f"{words[1].replace('.', '/')}.py").exists(), command
        elif words[0].endswith(".py") and "NAME" not in words[0]:
            source = (ROOT / words[0]).read_text()
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], command


@pytest.mark.parametrize("page", sorted({*PAGES} - {"docs/log.md"}))  # the log names what is gone, too
def test_files_and_folders_that_a_page_names_exist(page):
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)*/(?:\w+\.py)?)`", (ROOT / page).read_text())
    assert [path for path in named if not ((ROOT / path).exists() or (ROOT / "tieredkv" / path).exists())] == []


@cache
def definitions() -> tuple[set[str], set[str]]:
    """Classes of the package; its functions, and its methods and class fields as Class.name."""
    classes, functions = set(), set()
    for path in (ROOT / "tieredkv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.add(node.name)
            elif isinstance(node, ast.ClassDef):
                classes.add(node.name)
                for part in node.body:
                    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                        functions.add(f"{node.name}.{part.name}")
                    elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        functions |= {part.target.id, f"{node.name}.{part.target.id}"}
    return classes, functions


@pytest.mark.parametrize("page", INSIDE)
def test_functions_and_classes_that_a_page_names_exist(page):
    text, (classes, functions) = (ROOT / "docs" / f"{page}.md").read_text(), definitions()
    called = re.findall(r"`([A-Za-z_][\w.]*)\(\)`", text)
    members = [name for name in re.findall(r"`([A-Z]\w+\.[a-z]\w+)`", text) if name.split(".")[0] in classes]
    plain = [name.rpartition(".")[2] if name[0].islower() else name for name in called]  # without its module
    assert [name for name in (*plain, *members) if name not in functions] == []
    placed = re.findall(r"`(?:\w+\.)?(\w+)(?:\(\))?` (?:in |of |\()`((?:[a-z]\w*/)+\w+\.py)`", text)
    files = [
        (name, next(root / path for root in (ROOT / "tieredkv", ROOT) if (root / path).exists()))
        for name, path in placed
    ]
    assert [(name, path) for name, path in files if not re.search(rf"\b{name}\b", path.read_text())] == []
    others = {"Cache", "CancelledError", "PRESETS", "PeftModel"}
    named = set(re.findall(r"`([A-Z][a-z]+\w*|TieredKVError)`", text)) - others
    assert sorted(named - classes) == []


def comments_and_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Each with its line."""
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


@pytest.mark.parametrize("folder", ["tieredkv", "tests", "benchmarks", "examples"])
def test_files_and_members_that_comments_and_docstrings_name_exist(folder):
    classes, members = definitions()[0], set(definitions()[1])
    for path in (ROOT / "tieredkv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):  # what its methods set
                inner = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
                members |= {f"{node.name}.{part.attr}" for part in inner if ast.unparse(part.value) == "self"}
    files = {f"/{path.relative_to(ROOT)}" for path in ROOT.glob("*/**/*.py")}
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for line, text in comments_and_docstrings(path):
            missing = [
                name
                for name in re.findall(r"[\w./-]*\w\.py\b", text)
                if not any(file.endswith(f"/{name}") for file in files)
            ]
            missing += [
                name
                for name in re.findall(r"`([A-Z]\w+\.\w+)", text)
                if name.split(".")[0] in classes and name not in members
            ]
            wrong += [f"{path.relative_to(ROOT)}:{line}: {name}" for name in missing]
    assert wrong == []


def test_the_rooms_of_the_architecture_page_are_those_of_the_table():
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    rooms = re.findall(r"^\*\*(\w+)\*\* \(may import ([\w, ]+)\)", text, re.MULTILINE)
    written = [(name, "" if others == "nothing" else others.replace(",", "")) for name, others in rooms]
    assert written == list(ALLOWED.items())


def test_every_file_the_readme_links_to_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.model
def test_the_session_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", USING, re.DOTALL)
    (block,) = [b for b in blocks if "open_session" in b]
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "using.md", "exec"), {})
    *table, colour, chain, stats, talk, again = capsys.readouterr().out.strip().splitlines()
    assert any("visual tokens" in line for line in table)
    assert len(colour.split()) == 1
    assert talk.startswith(f"{colour} (('what colour was the ")
    assert again == colour
    assert len(chain.split()) == 6
    assert "hit_rate" in stats


@pytest.mark.slow
@pytest.mark.model
def test_the_command_lines_examples_run(tmp_path, short_video, monkeypatch, capsys):
    text = (ROOT / "docs" / "command-line.md").read_text()
    shell, (questions,), (settings,) = (
        re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("sh", "json", "toml")
    )
    (tmp_path / "film.mp4").write_bytes(short_video.read_bytes())
    (tmp_path / "questions.jsonl").write_text(questions)
    (tmp_path / "tieredkv.toml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    made = []
    for command in "".join(shell).splitlines():
        if " bench " in command:  # takes its time, and is run by test_cli_bench.py
            continue
        *echo, line = command.split(" | ")
        typed = "".join(" ".join(shlex.split(part)[1:]) + "\n" for part in echo)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        code, out, err = run(monkeypatch, capsys, *shlex.split(line)[1:])
        assert code == 0 or command.startswith("tieredkv doctor"), err
        made.append(out)
        if line.startswith("tieredkv run -"):
            assert json.loads(out)["text"] == made[0].strip()
    moon, cup, again, *_ = made
    assert again == moon
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [moon.strip(), json.loads(cup)["text"]]
    assert json.loads(made[-1])["checks"]
    assert {part.split()[1] for part in "".join(shell).replace("| ", "\n").splitlines() if "tieredkv " in part[:9]} == {
        "ask",
        "chat",
        "run",
        "plan",
        "models",
        "policies",
        "bench",
        "doctor",
    }


@pytest.mark.model
def test_the_guide_streams(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", USING, re.DOTALL)
    opening, streaming = [b for b in blocks if "import" in b and "scene" in b]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(opening, "using.md", "exec"), names)
    capsys.readouterr()
    exec(compile(streaming, "using.md", "exec"), names)
    chat, awaited = capsys.readouterr().out.strip().splitlines()
    text = chat.removesuffix(" (7 tokens)")
    assert len(text.split()) == 6
    assert awaited.startswith(f"{text} ")
    assert len(awaited.split()) == 7


def test_the_policy_contributing_shows_is_one(text_model, prompt_ids, monkeypatch):
    from tieredkv.policy.presets import POLICIES

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    monkeypatch.setitem(POLICIES, "loud", names["POLICY"])
    options = {"gpu_kv_gb": 1, "budget_ratio": 0.5, "policy": "loud", "recent_window": 8, "text_window": 16}
    with (
        tieredkv.use_attention(text_model),
        tieredkv.TieredCache(text_model.config, **tier_options(**options)) as cache,
    ):
        text_model.generate(prompt_ids, **cache_argument(cache), max_new_tokens=4, do_sample=False)
        assert cache.counters.static_heads > 0
        assert cache.counters.dynamic_heads == 0
