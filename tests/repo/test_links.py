"""The documents: links, anchors, commands and paths lead to something that exists; the README stays short."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY as ROOT

FOLDERS = ("csrc", "lowrank_ops", "tests", "benchmarks", "examples", "docs", ".ci")
README_LINES = 120

LINK = re.compile(r"""!?\[[^\]]*\]\(([^)\s]+)(?:\s+"[^"]*")?\)|(?:src|href)="([^"]+)\"""")
SPAN = re.compile(r"(`+)(.+?)\1")
HEADING = re.compile(r"#{1,6}\s+(.+?)\s*#*$")
COMMAND = re.compile(r"python3? -m ([A-Za-z_][\w.]*\w)")
TARGET = re.compile(r"\bmake ((?:[A-Z]+=\S+ )*)([a-z][a-z0-9-]*)")
PATH = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/\S*")
PLACEHOLDER = re.compile(r"[A-Z]{2,}")
VARIABLE = re.compile(r"""(?:getenv\(|environment\(|environ\.get\(|environ\[)\s*["'](LOWRANK_OPS_\w+)["']""")


def documents(root: Path) -> list[Path]:
    """Every markdown file that git tracks, or would track."""
    command = ["git", "rev-parse", "--show-toplevel"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if run.returncode != 0 or Path(run.stdout.rstrip("\n")) != root.resolve():
        pytest.skip("this is no git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "*.md"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return [path for name in sorted(set(run.stdout.splitlines())) if (path := root / name).is_file()]


def lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """(number, line, whether it is code) of a document; the fences themselves are left out."""
    fenced = indented = False
    blank = True
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        indented = line.startswith("    ") and (blank or indented)
        yield number, line, fenced or indented
        blank = not line.strip() or (blank and indented)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    found: set[str] = set()
    for _, line, code in lines(text):
        heading = None if code else HEADING.match(line)
        if heading is None:
            continue
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "").lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        numbered = (name if count == 0 else f"{name}-{count}" for count in range(len(found) + 1))
        found.add(next(candidate for candidate in numbered if candidate not in found))
    return found


def wrong_link(root: Path, document: Path, link: str) -> str | None:
    """What is wrong with a link, or None; addresses on the network are not looked up."""
    if re.match(r"[a-z][a-z+.-]*:", link):
        return None
    name, _, anchor = link.partition("#")
    target = (document.parent / name).resolve() if name else document.resolve()
    if not target.is_relative_to(root.resolve()):
        return f"link {link}: outside of the repository"
    if not target.exists():
        return f"link {link}: there is no such file"
    if anchor and (target.suffix != ".md" or anchor not in anchors(target.read_text())):
        return f"link {link}: there is no such anchor"
    return None


def wrong_path(root: Path, name: str) -> str | None:
    """What is wrong with a path in backticks: `*` and words in CAPS stand for anything, line and test are ignored."""
    name = re.sub(r"::.*|:\d[\d-]*$", "", name.rstrip(".,;)"))
    if (root / name).exists():
        return None
    pattern = PLACEHOLDER.sub("*", name)
    if "*" in pattern and any(root.glob(pattern.rstrip("/"))):
        return None
    return f"path {name}: there is no such file"


def wrong_command(root: Path, module: str) -> str | None:
    """What is wrong with `python -m module`."""
    first, *_ = module.split(".")
    file = root.joinpath(*module.split("."))
    if (root / first).is_dir() or (root / f"{first}.py").is_file():
        runs = file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()
    else:
        runs = importlib.util.find_spec(first) is not None
    return None if runs else f"python -m {module}: there is no such module to run"


def problems(root: Path, document: Path) -> list[str]:
    """All that is wrong in a document, a line for each."""
    makefile = root / "Makefile"
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile.read_text(), re.M)) if makefile.is_file() else set()
    found: list[tuple[int, str | None]] = []
    for number, line, code in lines(document.read_text()):
        spans = [line] if code else [span for _, span in SPAN.findall(line)]
        found += [(number, wrong_command(root, module)) for module in COMMAND.findall(line)]
        for span in spans:
            for _, target in TARGET.findall(span):
                missing = target not in targets
                found.append((number, f"make {target}: the Makefile has no such target" if missing else None))
        if code:
            continue
        for span in spans:
            word = span.split()[0] if span.split() else ""
            if PATH.fullmatch(word):
                found.append((number, wrong_path(root, word)))
        prose = SPAN.sub(lambda match: "x" * len(match[0]), line)
        found += [(number, wrong_link(root, document, first or second)) for first, second in LINK.findall(prose)]
    name = document.relative_to(root)
    return [f"{name}:{number}: {problem}" for number, problem in found if problem]


def test_documents_lead_to_what_exists() -> None:
    found = documents(ROOT)
    assert ROOT / "README.md" in found and len(found) > 5
    assert not [problem for document in found for problem in problems(ROOT, document)]


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text().splitlines()
    assert len(text) <= README_LINES
    assert not [line for line in text if len(line) > 120 and not line.startswith("|")]


def test_environment_variables_are_documented() -> None:
    folders = ("csrc", "lowrank_ops", "tests", "benchmarks")
    sources = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    texts = [path.read_text() for path in sources if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    names = {name for text in texts for name in VARIABLE.findall(text)}
    assert {"LOWRANK_OPS_CPU_ISA", "LOWRANK_OPS_CUDA"} <= names
    documented = (ROOT / "docs/configuration.md").read_text()
    assert not [name for name in sorted(names) if f"`{name}`" not in documented]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository whose document is right."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/tucker.cpp").touch()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/run.py").touch()
    (tmp_path / "Makefile").write_text("test: built\n\tpytest\n")
    (tmp_path / "docs/plot.png").touch()
    (tmp_path / "docs/more.md").write_text("# A `code` heading, twice\n\n# A `code` heading, twice\n")
    (tmp_path / "README.md").write_text(
        "# Title\n\n[more](docs/more.md#a-code-heading-twice-1) [here](#title) ![plot](docs/plot.png)\n"
        "[far](https://example.org/missing) `csrc/cpu/tucker.cpp:12` `csrc/*/tucker.*` `csrc/cpu/OP.cpp`\n\n"
        "    python -m benchmarks.run --json csrc/missing.cpp; make ARGS=x test\n\n`python -m pytest` `[a](b)`\n"
    )
    return tmp_path


def test_a_right_document_passes(repository: Path) -> None:
    assert problems(repository, repository / "README.md") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[more](docs/missing.md)", "link docs/missing.md: there is no such file"),
        ("![plot](docs/missing.png)", "link docs/missing.png: there is no such file"),
        ('<img src="docs/missing.png">', "link docs/missing.png: there is no such file"),
        ("[`more`](docs/more.md#missing)", "link docs/more.md#missing: there is no such anchor"),
        (
            "[more](docs/more.md#a-code-heading-twice-2)",
            "link docs/more.md#a-code-heading-twice-2: there is no such anchor",
        ),
        ("[here](#missing)", "link #missing: there is no such anchor"),
        ("[out](../README.md)", "link ../README.md: outside of the repository"),
        ("see `csrc/missing.cpp`", "path csrc/missing.cpp: there is no such file"),
        ("see `csrc/*.cu`", "path csrc/*.cu: there is no such file"),
        ("see `tests/OP.py`", "path tests/OP.py: there is no such file"),
        ("`python -m benchmarks.missing`", "python -m benchmarks.missing: there is no such module to run"),
        ("    python -m benchmarks", "python -m benchmarks: there is no such module to run"),
        ("    python -m no_such_package.run", "python -m no_such_package.run: there is no such module to run"),
        ("```\nmake missing\n```", "make missing: the Makefile has no such target"),
    ],
)
def test_a_broken_document_fails(repository: Path, text: str, problem: str) -> None:
    document = repository / "README.md"
    document.write_text(f"{document.read_text()}\n{text}\n")
    (found,) = problems(repository, document)
    assert re.fullmatch(rf"README\.md:\d+: {re.escape(problem)}", found)
