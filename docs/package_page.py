"""The README as a package page shows it, which has no folder beside it: for setup.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def repository(root: Path) -> str | None:
    """The web address of the checkout's origin; None without a checkout, an origin, or one on the web."""
    command = ["git", "-C", str(root), "config", "--get", "remote.origin.url"]
    try:
        origin = subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    origin = re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", origin)
    return origin.removesuffix(".git").rstrip("/") if origin.startswith("https://") else None


def package_page(readme: str, address: str | None, commit: str) -> str:
    """The README with whole addresses instead of relative ones.

    Args:
        readme: its text.
        address: of the repository, from `repository`. None: links become their text, and images are left out.
        commit: a commit or tag in the repository.
    """

    def absolute(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        if address is None:
            return "" if image else text
        return f"{image}[{text}]({address}/{'raw' if image else 'blob'}/{commit}/{path})"

    return LINK.sub(absolute, readme)
