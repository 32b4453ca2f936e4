"""The pages: links lead somewhere, titles differ, the index and the list of modules are complete."""

import re
from pathlib import Path

from testing import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Returns the links of a page, except those to the web, that lead to no file or to no heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("https://") and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    return broken


def test_links_lead_to_files_and_headings_that_are_there():
    assert {page.name: broken for page in PAGES if (broken := broken_links(page))} == {}


def test_no_two_pages_have_one_title_and_the_index_names_all():
    titles = [page.read_text().splitlines()[0] for page in PAGES]
    assert len(set(titles)) == len(titles)
    index = (DOCS / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"({page.name})" not in index and page.name != "README.md"] == []


def test_the_architecture_page_names_every_module_of_every_room():
    rooms = (DOCS / "architecture.md").read_text().split("## The rooms")[1]
    named = set(re.findall(r"`(\w+)/?`", rooms))
    package = ROOT / "src/dit4sr_pl"
    modules = {path.stem for path in package.rglob("*.py")} | {path.parent.name for path in package.rglob("*.py")}
    in_packages_of_rooms = {path.stem for path in package.glob("*/*/*.py")}
    assert modules - {"__init__", "dit4sr_pl"} - in_packages_of_rooms - named == set()
