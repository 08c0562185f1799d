"""For mkdocs: pages link to ../benchmarks/results/, as on GitHub; the site gets a copy of those files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> None:
    """Add the results to the site."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link to the copies."""
    return markdown.replace("](../benchmarks/results/", "](results/")
