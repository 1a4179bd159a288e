"""Where things lie."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CSRC = REPOSITORY / "csrc"
SIMULATOR = REPOSITORY / "tests" / "support" / "simulator"
