from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgediffusion import files
from edgediffusion.errors import OutputError
from edgediffusion.files import dump_json, link_or_copy, new_file, new_folder, sha256

FOLDER_SCRIPT = """
import sys, time
from pathlib import Path
from edgediffusion.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"x" * 100_000)
    if sys.argv[2] == "hang":
        print("writing", flush=True)
        time.sleep(60)
"""
FILE_SCRIPT = FOLDER_SCRIPT.replace("new_folder", "new_file").replace('(folder / "half")', "folder")


def everything(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("1", encoding="utf-8")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text(encoding="utf-8") == "1"
    assert everything(tmp_path / "deep") == ["out"]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with new_file(tmp_path / "state.json") as file:
        assert file.suffix == ".json"  # libraries look at it
        file.write_text("1", encoding="utf-8")
    assert everything(tmp_path) == ["state.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("make", [new_folder, new_file])
def test_an_exception_leaves_nothing_and_passes_through(tmp_path: Path, make: object, error: BaseException) -> None:
    with pytest.raises(type(error)), make(tmp_path / "out") as partial:  # type: ignore[operator]
        (partial / "a" if make is new_folder else partial).write_bytes(b"half")
        raise error
    assert everything(tmp_path) == []


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_an_output_that_exists_is_refused_and_kept(tmp_path: Path, make: object) -> None:
    (tmp_path / "out").write_text("precious", encoding="utf-8")
    with pytest.raises(OutputError, match="exists already"), make(tmp_path / "out"):  # type: ignore[operator]
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "precious"


def test_a_link_that_leads_nowhere_is_an_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "out"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole_and_open_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    old = tmp_path / "out"
    old.mkdir()
    (old / "file").write_text("old", encoding="utf-8")
    with (old / "file").open(encoding="utf-8") as held:
        with new_folder(old, replace=True) as folder:
            (folder / "file").write_text("new", encoding="utf-8")
            assert (old / "file").read_text(encoding="utf-8") == "old"
        assert (old / "file").read_text(encoding="utf-8") == "new"
        assert held.read() == "old"
    assert everything(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="no"), new_folder(old, replace=True):
        raise ValueError("no")
    assert (old / "file").read_text(encoding="utf-8") == "new"
    with new_folder(tmp_path / "another", replace=True):
        pass
    assert everything(tmp_path) == ["another", "out"]


def test_where_a_link_leads_is_what_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with new_folder(tmp_path / "link", replace=True) as folder:
        (folder / "file").write_text("new", encoding="utf-8")
    assert everything(tmp_path) == ["link", "out"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "new"


def test_where_the_second_rename_fails_the_old_folder_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename, old = os.rename, tmp_path / "out"
    old.mkdir()
    (old / "file").write_text("old", encoding="utf-8")

    def refuse_the_new_one(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_the_new_one)
    with pytest.raises(OSError, match="Input/output error"), new_folder(old, replace=True):
        pass
    assert everything(tmp_path) == ["out"]
    assert (old / "file").read_text(encoding="utf-8") == "old"


def test_an_output_that_another_process_finishes_first_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_refuse_existing", lambda path: None)  # it appears between the look and the rename
    with pytest.raises(OutputError, match="exists already: another process has written it meanwhile"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs", encoding="utf-8")
    assert everything(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert everything(tmp_path) == ["out"]


def test_a_file_is_replaced_only_when_asked_and_only_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old", encoding="utf-8")
    with new_file(tmp_path / "out", replace=True) as file:
        file.write_text("new", encoding="utf-8")
        assert (tmp_path / "out").read_text(encoding="utf-8") == "old"
    assert (tmp_path / "out").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("script", [FOLDER_SCRIPT, FILE_SCRIPT], ids=["folder", "file"])
def test_after_kill_9_the_same_command_works_and_nothing_is_left_over(tmp_path: Path, script: str) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", script, str(out), "hang"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert len(everything(tmp_path)) == 1  # what the killed run left
    subprocess.run([sys.executable, "-c", script, str(out), "finish"], check=True)
    assert everything(tmp_path) == ["out"]


def test_a_name_with_brackets_is_swept_too(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    ).stdout.strip()
    (tmp_path / f".out[1].partial-{dead}").mkdir()
    with new_folder(tmp_path / "out[1]"):
        pass
    assert everything(tmp_path) == ["out[1]"]


def test_the_partial_output_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert everything(tmp_path) == [other.name, "out"]


def test_a_similar_name_of_the_user_is_not_swept(tmp_path: Path) -> None:
    precious = tmp_path / ".out.partial-notes"
    precious.write_text("mine", encoding="utf-8")
    with new_folder(tmp_path / "out"):
        pass
    assert precious.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("make", [new_folder, new_file])
def test_a_full_disk_is_told_and_nothing_is_kept(tmp_path: Path, make: object, code: int) -> None:
    with pytest.raises(OutputError, match="The disk is full"), make(tmp_path / "out") as partial:  # type: ignore[operator]
        (partial / "a" if make is new_folder else partial).write_bytes(b"half")
        raise OSError(code, os.strerror(code))
    assert everything(tmp_path) == []


def test_a_disk_that_fills_up_when_data_is_synced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match="The disk is full"), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"x")
    assert everything(tmp_path) == []


def test_a_really_full_disk(tmp_path: Path) -> None:
    """/dev/full takes no byte: what a full disk answers, without the right to mount a small one."""
    with pytest.raises(OutputError, match="The disk is full"), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"half")
        Path("/dev/full").write_bytes(b"x" * 100_000)
    assert everything(tmp_path) == []


def test_a_parent_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises((OutputError, OSError)), new_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_linking_shares_the_bytes_and_copying_does_not(tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"w")
    link_or_copy(source, tmp_path / "a" / "linked")
    link_or_copy(source, tmp_path / "a" / "copied", link=False)
    assert (tmp_path / "a" / "linked").samefile(source)
    assert not (tmp_path / "a" / "copied").samefile(source)


def test_a_symbolic_link_is_followed_to_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    (tmp_path / "link").symlink_to(tmp_path / "weights")
    link_or_copy(tmp_path / "link", tmp_path / "linked")
    assert not (tmp_path / "linked").is_symlink()
    assert (tmp_path / "linked").samefile(tmp_path / "weights")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_where_links_cannot_be_made_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "weights").write_bytes(b"w")
    monkeypatch.setattr(files.os, "link", refuse)
    link_or_copy(tmp_path / "weights", tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == b"w"


def test_sha256_and_its_form_for_python_3_10_agree(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "f") == known
    with open(tmp_path / "f", "rb") as file:
        assert files._digest(file) == known


def test_json_is_the_same_bytes_whatever_the_order() -> None:
    assert dump_json({"b": 1, "a": "é"}) == dump_json({"a": "é", "b": 1}) == '{\n "a": "é",\n "b": 1\n}\n'
