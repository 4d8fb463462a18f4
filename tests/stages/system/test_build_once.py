"""A folder is built once, and again only after damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.system.integrity import SEAL, build_once


def test_built_once_and_again_after_damage(tmp_path: Path) -> None:
    folder, builds = tmp_path / "store" / "key", []

    def build(work: Path) -> None:
        builds.append(work.name)
        work.mkdir()
        (work / "data").write_text("complete")

    build_once(folder, build)
    build_once(folder, build)
    assert builds == ["key.unfinished"]
    assert {path.name for path in folder.parent.iterdir()} == {"key", "key.lock"}
    assert {path.name for path in folder.iterdir()} == {"data", SEAL}

    (folder / "data").write_text("damaged")
    build_once(folder, build)
    assert len(builds) == 2
    assert (folder / "data").read_text() == "complete"


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "key"

    def fail(work: Path) -> None:
        work.mkdir()
        raise ValueError("no space")

    (tmp_path / "key.unfinished").mkdir()  # left by a killed run
    for _ in range(2):
        with pytest.raises(ValueError, match="no space"):
            build_once(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
