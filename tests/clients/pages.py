"""The pages of docs/clients, and the examples on them."""

import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "clients"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")


def text(page: str) -> str:
    return (FOLDER / f"{page}.md").read_text(encoding="utf-8")


def examples(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def example(page: str, language: str) -> str:
    """The page's one example in that language."""
    (found,) = examples(page, language)
    return found
