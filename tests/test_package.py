"""What the package says of itself: one version, extras as a page explains them, least versions that can be pinned."""

import re
import tomllib

from running import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> list[str]:
    """Of requirements, the packages, with their extras."""
    return [re.split(r"[><=~!;]", requirement)[0] for requirement in requirements]


def test_a_page_explains_every_extra() -> None:
    """The table of docs/install.md has a row for each extra, with the packages that it brings."""
    page = (REPOSITORY / "docs" / "install.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page, re.MULTILINE)
    said = {extra: re.findall(r"`([^`]+)`", brings) for extra, brings in rows}
    assert said == {extra: names(its) for extra, its in PROJECT["optional-dependencies"].items()}


def test_one_version_everywhere() -> None:
    """Of pyproject.toml, CITATION.cff and the newest entry of the changelog, whose date is the citation's."""
    citation = (REPOSITORY / "CITATION.cff").read_text()
    of_citation = dict(re.findall(r"^(version|date-released|license): (\S+)$", citation, re.MULTILINE))
    newest = re.search(r"^## (\S+) - (\S+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest.groups() == (PROJECT["version"], of_citation["date-released"])
    assert of_citation["version"] == PROJECT["version"] and of_citation["license"] == PROJECT["license"]


def test_each_dependency_has_a_least_version_that_can_be_pinned() -> None:
    """`.ci/run` installs `name==bound` for each `name>=bound`, so nothing else may stand there."""
    assert [each for each in PROJECT["dependencies"] if not re.fullmatch(r"[a-z-]+\d?>=\d+\.\d+\.\d+", each)] == []
