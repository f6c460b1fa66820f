"""The configuration page is what the classes say."""

from pathlib import Path

from narses_lab.reference import PROGRAMS, markdown

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run: python -m narses_lab.reference > docs/configuration.md"


def test_every_key_of_every_program_is_there_with_its_meaning() -> None:
    page = markdown()

    for _, config in PROGRAMS:
        for name, field in config.model_fields.items():
            section = f"[{name}]`" in page
            assert section or (f"| `{name}` |" in page and field.description), f"{name} is missing or has no docstring"
