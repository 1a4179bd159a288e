"""The README on a package page: no link and no image leads nowhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from docs.package_page import package_page, repository
from tests.support.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
RELATIVE = re.compile(r"\]\((?!https?:|#)")


def test_relative_addresses_become_whole_ones() -> None:
    text = "![a picture](docs/a.png) and [a page](docs/b.md#part), [the web](https://example.org), [here](#there)"
    assert package_page(text, "https://github.com/someone/lowrank_ops", "v1.0.0") == (
        "![a picture](https://github.com/someone/lowrank_ops/raw/v1.0.0/docs/a.png) and "
        "[a page](https://github.com/someone/lowrank_ops/blob/v1.0.0/docs/b.md#part), "
        "[the web](https://example.org), [here](#there)"
    )
    assert package_page(text, None, "") == " and a page, [the web](https://example.org), [here](#there)"


@pytest.mark.parametrize("address", ["https://github.com/someone/lowrank_ops", None])
def test_the_readme(address: str | None) -> None:
    assert RELATIVE.search(README)
    page = package_page(README, address, "v1.0.0")
    assert not RELATIVE.search(page)
    assert page.count("![") == (0 if address is None else README.count("!["))


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://github.com/someone/lowrank_ops.git", "https://github.com/someone/lowrank_ops"),
        ("git@github.com:someone/lowrank_ops.git", "https://github.com/someone/lowrank_ops"),
        ("ssh://git@gitlab.com/someone/lowrank_ops", "https://gitlab.com/someone/lowrank_ops"),
        ("/srv/git/lowrank_ops", None),
        (None, None),
    ],
)
def test_the_address_of_the_origin(origin: str | None, address: str | None, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    if origin is not None:
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", origin], check=True)
    assert repository(tmp_path) == address


def test_without_a_checkout_there_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert repository(tmp_path) is None
