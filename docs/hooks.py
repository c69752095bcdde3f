"""What the site takes from outside of docs/: the README as its first page, and measured plots."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Add the first page and the plots."""
    root = Path(config.config_file_path).parent
    readme = (root / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for plot in sorted((root / RESULTS).glob("*.png")):
        uri = f"{RESULTS}/{plot.name}"
        files.append(File.generated(config, uri, abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point a page at the plots' place in the site."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
