"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tutelage
import tutelage.artefacts._artefact as artefact
from helpers import logits_of, make_batch, make_student, make_tokenizer
from tutelage._files import staged_files
from tutelage.artefacts import (
    refuse_existing,
    staged_directory,
    write_artefact,
    write_failures_as_os_error,
    write_text,
)
from tutelage.errors import ArtefactError, OutputExistsError


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: files with their bytes, folders and links with ``None``."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestOverwrite:
    def test_a_folder_with_files_is_refused_and_untouched(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "precious.txt").write_text("mine")
        with pytest.raises(OutputExistsError, match=r"not empty.*overwrite=True \(--overwrite\)"):
            tutelage.save(make_student(), out)
        assert tree(tmp_path) == {"out": None, "out/precious.txt": b"mine"}

    def test_an_empty_folder_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        tutelage.save(make_student(), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        tutelage.load(tmp_path / "out")

    def test_overwrite_replaces_the_whole_folder(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        tutelage.save(make_student(), out, processor=make_tokenizer())
        (out / "old.txt").write_text("old")
        tutelage.save(make_student(seed=1), out, overwrite=True)
        names = {path.name for path in out.iterdir()}
        assert names == {"README.md", "config.json", "model.safetensors"}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_file_in_the_way_is_refused(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "out").write_text("a file")
        with pytest.raises(OutputExistsError, match="is a file; name a folder"):
            tutelage.save(make_student(), tmp_path / "out", overwrite=overwrite)
        assert tree(tmp_path) == {"out": b"a file"}

    def test_missing_parents_are_made(self, tmp_path: Path) -> None:
        tutelage.save(make_student(), str(tmp_path / "a" / "b" / "out"))
        assert (tmp_path / "a" / "b" / "out" / "config.json").is_file()

    def test_refuse_existing_accepts_what_is_free(self, tmp_path: Path) -> None:
        refuse_existing(tmp_path)
        refuse_existing(tmp_path / "missing")
        (tmp_path / "file").touch()
        refuse_existing(tmp_path, overwrite=True)

    def test_the_current_folder_is_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        tutelage.save(make_student(), ".")
        assert (tmp_path / "config.json").is_file()

    def test_a_link_to_a_folder_leaves_nothing_beside_it(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        tutelage.save(make_student(), tmp_path / "link")
        assert {path.name for path in tmp_path.iterdir()} == {"link", "real"}


FAILING = {
    "weights": ("transformers.modeling_utils", "safe_save_file"),
    "card": ("tutelage.artefacts._artefact", "write_text"),
    "rename": ("os", "rename"),
    "folder": ("pathlib.Path", "mkdir"),
}


class TestFullDisk:
    @pytest.mark.parametrize("part", list(FAILING))
    def test_nothing_is_left_behind(
        self, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        student = make_student()
        where, name = FAILING[part]
        monkeypatch.setattr(f"{where}.{name}", full_disk)
        with pytest.raises(ArtefactError, match=r"No space left on device.*nothing was left"):
            tutelage.save(student, tmp_path / "out", processor=make_tokenizer())
        monkeypatch.undo()
        assert not list(tmp_path.iterdir())
        tutelage.save(student, tmp_path / "out")

    @pytest.mark.parametrize("part", [part for part in FAILING if part != "folder"])
    def test_the_folder_to_overwrite_stays(
        self, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tutelage.save(make_student(), tmp_path / "out")
        before = tree(tmp_path)
        where, name = FAILING[part]
        monkeypatch.setattr(f"{where}.{name}", full_disk)
        with pytest.raises(ArtefactError, match="No space left on device"):
            tutelage.save(make_student(seed=1), tmp_path / "out", overwrite=True)
        assert tree(tmp_path) == before

    def test_the_folder_to_overwrite_stays_when_the_last_rename_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tutelage.save(make_student(), tmp_path / "out")
        before, real, calls = tree(tmp_path), os.rename, []

        def second_fails(source: Any, target: Any) -> None:
            calls.append(source)
            if len(calls) == 2:
                full_disk()
            real(source, target)

        monkeypatch.setattr(os, "rename", second_fails)
        with pytest.raises(ArtefactError):
            tutelage.save(make_student(seed=1), tmp_path / "out", overwrite=True)
        assert tree(tmp_path) == before

    def test_no_parent_is_left_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(artefact, "write_text", full_disk)
        with pytest.raises(ArtefactError):
            tutelage.save(make_student(), tmp_path / "a" / "b")
        assert not list(tmp_path.iterdir())

    def test_an_error_of_another_kind_passes_and_cleans_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(artefact, "model_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tutelage.save(make_student(), tmp_path / "out")
        assert not list(tmp_path.iterdir())


LIMITED = """
import json, resource, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import tutelage
from helpers import make_student, make_tokenizer
from tutelage.errors import ArtefactError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root, student, told = Path(sys.argv[2]), make_student(), {}
for limit in (100, 3000, 8000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for name, overwrite in (("new", False), ("old", True)):
        try:
            tutelage.save(student, root / name, processor=make_tokenizer(), overwrite=overwrite)
        except ArtefactError as error:
            told[f"{limit} {name}"] = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(told))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_file_that_the_system_cuts_off_leaves_no_trace(tmp_path: Path) -> None:
    tutelage.save(make_student(seed=5), tmp_path / "old")
    before = tree(tmp_path)
    sizes = sorted(len(content) for content in before.values() if content is not None)
    assert sizes[-1] > 8000  # the weights pass every limit
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tests), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == 6
    assert all("File too large" in message for message in told.values())
    assert all("nothing was left behind" in message for message in told.values())
    assert tree(tmp_path) == before


class TestStaging:
    def test_directory_is_invisible_until_it_is_complete(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with staged_directory(out) as stage:
            assert stage.parent == tmp_path  # the rename stays on one file system
            (stage / "a").write_text("1")
            assert not out.exists()
        assert tree(tmp_path) == {"out": None, "out/a": b"1"}

    def test_directory_takes_the_place_of_remains_of_a_killed_process(self, tmp_path: Path) -> None:
        remains = tmp_path / f".out.partial-{os.getpid()}"
        remains.mkdir()
        (remains / "half").write_text("half")
        with staged_directory(tmp_path / "out") as stage:
            (stage / "a").write_text("1")
        assert tree(tmp_path) == {"out": None, "out/a": b"1"}

    def test_typed_errors_pass_unchanged(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ArtefactError, match=r"^mine$"),
            staged_directory(tmp_path / "out"),
        ):
            raise ArtefactError("mine")
        with pytest.raises(ArtefactError, match=r"^mine$"), staged_files(tmp_path):
            raise ArtefactError("mine")
        assert not list(tmp_path.iterdir())

    def test_files_replace_their_namesakes_and_leave_the_rest(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("old")
        (tmp_path / "b").write_text("stays")
        with staged_files(tmp_path) as stage:
            (stage / "a").write_text("new")
            (stage / "c").write_text("new")
            assert (tmp_path / "a").read_text() == "old"
        assert tree(tmp_path) == {"a": b"new", "b": b"stays", "c": b"new"}

    def test_files_are_not_moved_after_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("old")

        def write() -> None:
            with staged_files(tmp_path) as stage:
                (stage / "a").write_text("new")
                full_disk()

        with pytest.raises(ArtefactError, match=r"could not write into .*No space left"):
            write()
        assert tree(tmp_path) == {"a": b"old"}

    def test_text_is_replaced_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "note.txt"
        write_text(file, "ä\n")
        assert file.read_bytes() == "ä\n".encode()
        monkeypatch.setattr(os, "replace", full_disk)
        with pytest.raises(ArtefactError, match=r"could not write .*note\.txt"):
            write_text(file, "other")
        monkeypatch.undo()
        assert tree(tmp_path) == {"note.txt": "ä\n".encode()}


def test_write_artefact_adds_to_a_folder_that_holds_other_files(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    student = make_student()
    write_artefact(student, tmp_path, processor=make_tokenizer(), metrics={"accuracy": 1.0})
    write_artefact(student, tmp_path, processor=make_tokenizer(), metrics={"accuracy": 0.5})
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "result.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "0.5000" in (tmp_path / "README.md").read_text()
    loaded = tutelage.load(tmp_path)
    assert logits_of(loaded, make_batch()).equal(logits_of(student, make_batch()))


def test_a_failure_of_safetensors_to_write_is_an_artefact_error(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with (
        pytest.raises(ArtefactError, match=r"No space left.*nothing was left behind"),
        staged_directory(tmp_path / "out"),
        write_failures_as_os_error(),
    ):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())
