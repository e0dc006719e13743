"""What the README and docs show is what examples/ runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_readme_shows_the_quickstart(page: str) -> None:
    example = (ROOT / "examples/quickstart.py").read_text()
    code = example.split('"""\n\n', 1)[1]
    assert [strip_comments(b) for b in python_blocks(page)] == [strip_comments(code)]


@pytest.mark.parametrize("page", ["catalog", "calibration", "policies"])
def test_a_page_shows_its_example(page: str) -> None:
    code = (ROOT / f"examples/{page}.py").read_text().split('"""\n\n', 1)[1]
    assert python_blocks(f"docs/{page}.md") == [code]


def test_the_serving_page_shows_its_example() -> None:
    code = (ROOT / "examples/serving/held.py").read_text().split('"""\n\n', 1)[1]
    assert python_blocks("docs/serving.md") == [code]


def strip_comments(code: str) -> str:
    """Without comments, which the Korean page has in Korean."""
    return re.sub(r"  # .*", "", code)


@pytest.mark.parametrize(
    "page", [p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]]
)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
