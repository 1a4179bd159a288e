"""csrc/compile.py: when a source file is compiled again, and what happens when it does not compile."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from csrc import compile as compiling

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


class Source:
    """A source file that includes a header, and the object that is made of it."""

    def __init__(self, folder: Path) -> None:
        self.source, self.header, self.made = folder / "a.cpp", folder / "a.h", folder / "made/a.o"
        self.header.write_text("inline int one() { return 1; }\n")
        self.source.write_text('#include "a.h"\nint f() { return one(); }\n')
        time.sleep(0.05)  # what changes while the compiler runs is not recorded, and the clock of files is coarse

    def compile(self, *flags: str, version: str = "1") -> bool:
        """Whether the compiler ran."""
        return compiling.compile_source(["g++", *flags], version, self.source, self.made) > 0


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_an_object_is_up_to_date_until_something_changes(source: Source) -> None:
    assert source.compile()
    before = source.made.read_bytes()
    assert not source.compile()
    source.header.touch()
    assert not source.compile(), "its content is what counts"
    source.header.write_text("inline int one() { return 2; }\n")
    time.sleep(0.05)
    assert source.compile() and source.made.read_bytes() != before
    assert not source.compile()


def test_another_command_or_compiler_compiles_again(source: Source) -> None:
    assert source.compile() and source.compile("-O2") and not source.compile("-O2")
    assert source.compile("-O2", version="2") and not source.compile("-O2", version="2")
    assert source.compile(version="2")


def test_a_lost_object_is_made_again(source: Source) -> None:
    assert source.compile()
    source.made.unlink()
    assert source.compile() and source.made.exists()


def test_a_header_that_is_gone_fails_and_comes_back(source: Source) -> None:
    assert source.compile()
    text = source.header.read_text()
    source.header.unlink()
    with pytest.raises(RuntimeError, match=r"a\.h: No such file"):
        source.compile()
    source.header.write_text(text)
    time.sleep(0.05)
    assert source.compile(), "the failed compile left no record"


def test_a_failed_compile_says_why_and_is_tried_again(source: Source) -> None:
    assert source.compile()
    good = source.source.read_text()
    source.source.write_text(good + "int g() { return h(); }\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"lowrank_ops: g\+\+ failed on .*a\.cpp\n(.|\n)*.h. was not declared"):
            source.compile()
    source.source.write_text(good)
    time.sleep(0.05)
    assert source.compile()


def test_warnings_are_kept_beside_the_object(source: Source) -> None:
    source.source.write_text(source.source.read_text() + "static int unused;\n")
    time.sleep(0.05)
    assert source.compile("-Wall")
    assert "unused" in source.made.with_suffix(".messages").read_text()


def test_the_record_names_every_file_that_was_read(source: Source) -> None:
    source.compile()
    record = json.loads(source.made.with_suffix(".json").read_text())
    assert {str(source.source), str(source.header)} <= set(record["files"]) and record["seconds"] > 0


def test_a_file_that_changes_while_it_is_compiled_is_not_recorded(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.run

    def slow(*arguments, **options):
        done = real(*arguments, **options)
        source.header.write_text("inline int one() { return 3; }\n")
        return done

    monkeypatch.setattr(compiling.subprocess, "run", slow)
    assert source.compile()
    monkeypatch.undo()
    time.sleep(0.05)
    assert source.compile() and not source.compile()


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert compiling.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert compiling.jobs() >= 1
