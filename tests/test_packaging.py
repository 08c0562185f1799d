"""What `import tieredkv` loads and offers, and that the package's metadata is true."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tieredkv

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "tieredkv").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMES_WITH = {
    "triton": "torch",
    "starlette": "fastapi",
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
}
"""Imported here, but installed by another dependency; triton only on platforms that have it."""
IMPORT_NAMES = {"pillow": "PIL", "python-multipart": "python_multipart"}
"""Import names of distributions that have another name."""


def python(code: str) -> str:
    """stdout of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.subprocess
def test_importing_it_imports_nothing_but_itself_and_the_standard_library():
    """So that it takes no time, whatever the machine."""
    code = "import json, sys; before = {*sys.modules}; import tieredkv; print(json.dumps([*{*sys.modules} - before]))"
    loaded = {name.split(".")[0] for name in json.loads(python(code))}
    assert "tieredkv" in loaded
    assert loaded <= {"tieredkv", *sys.stdlib_module_names}


@pytest.mark.subprocess
def test_errors_settings_and_statistics_need_no_transformers():
    code = "import sys; from tieredkv import TierConfig, BudgetError, Stats; print('transformers' in sys.modules)"
    assert python(code).strip() == "False"


@pytest.mark.subprocess
def test_the_attention_is_registered_with_what_needs_it():
    """Each name in its own process, forked after the slow imports."""
    code = """
import os, sys
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

for name in ("TieredCache", "open_session"):
    if not os.fork():
        import tieredkv
        getattr(tieredkv, name)
        os._exit("tieredkv" not in AttentionInterface() or "tieredkv" not in AttentionMaskInterface())
    print(name, os.wait()[1])
"""
    assert python(code).splitlines() == ["TieredCache 0", "open_session 0"]


def test_every_public_name_is_there_for_imports_dir_and_type_checkers():
    tree = ast.parse((ROOT / "tieredkv/__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert homes == {name: f"tieredkv.{home}" for name, home in tieredkv._HOME.items()}
    assert sorted(homes) == sorted(tieredkv.__all__)
    assert set(tieredkv.__all__) <= set(dir(tieredkv))
    for name, home in homes.items():
        assert getattr(tieredkv, name) is getattr(import_module(home), name)
    namespace: dict = {}
    exec("from tieredkv import *", namespace)
    assert set(tieredkv.__all__) <= set(namespace)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(tieredkv, "generat")


def test_every_library_imported_is_declared():
    extras = PROJECT["optional-dependencies"]
    stated = PROJECT["dependencies"] + [
        one for name in ("cpu", "plot", "smolvlm", "quantised", "serve") for one in extras[name]
    ]
    names = [re.split(r"[<>=\[]", one)[0] for one in stated]
    declared = {IMPORT_NAMES.get(name, name) for name in names} | {"tieredkv"}
    imported: dict[str, str] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {module.split(".")[0]: str(path) for module in modules}
    foreign = {name: path for name, path in imported.items() if name not in sys.stdlib_module_names}
    assert {name: path for name, path in foreign.items() if COMES_WITH.get(name, name) not in declared} == {}


def test_the_version_is_stated_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    said = [path for path in [*SOURCES, ROOT / "pyproject.toml"] if tieredkv.__version__ in path.read_text()]
    assert said == [ROOT / "tieredkv/__init__.py"]
