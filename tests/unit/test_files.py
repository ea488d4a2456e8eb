"""Outputs appear whole or not at all; hashes of files and folders are what other tools would say."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qlora.errors import UserError
from qlora.files import (
    check_files,
    files_below,
    meanwhile,
    read_json,
    read_jsonl,
    replacing,
    sha256_of,
    sha256_of_file,
    write_json,
    write_jsonl,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_replaces_an_older_one(tmp_path):
    path = tmp_path / "deep" / "out.txt"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent.parent == path.parent, "another file system could make the rename a copy"
        assert path.read_text() == text
    assert names(path.parent) == ["out.txt"]


def test_folder_replaces_an_older_one_whole(tmp_path):
    path = tmp_path / "out"
    for name in ("first", "second"):
        with replacing(path) as folder:
            folder.mkdir()
            (folder / name).touch()
    assert names(path) == ["second"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [UserError("bad row"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_error_leaves_the_old_output_and_no_litter(tmp_path, error):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()

    def fail_half_way(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text("half") if path.is_file() else temporary.mkdir()
            raise error

    for name in ("file", "folder"):
        with pytest.raises(type(error)):
            fail_half_way(tmp_path / name)
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path / "folder") == ["old"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_link_is_replaced_and_what_it_points_to_stays(tmp_path, kind):
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "old").touch()
    (tmp_path / "out").symlink_to(tmp_path / "cached")
    with replacing(tmp_path / "out") as temporary:
        temporary.touch() if kind == "file" else temporary.mkdir()
    assert not (tmp_path / "out").is_symlink()
    assert names(tmp_path / "cached") == ["old"]


def test_output_has_the_usual_permissions(tmp_path):
    with replacing(tmp_path / "out") as folder:
        folder.mkdir()
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_hash_of_a_file_is_sha256_of_its_bytes(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(os.urandom(1 << 20) + b"and a bit")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256_of_file(path) == sha256_of(path) == expected


def make_folder(folder: Path, order: list[str]) -> Path:
    for name in order:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return folder


NAMES = ["b.txt", "a/z.txt", "a.txt", "a/é 数.txt", "a-b/c.txt", "Z.txt"]


def test_hash_of_a_folder_does_not_depend_on_the_order_of_its_listing(tmp_path):
    one = make_folder(tmp_path / "one", NAMES)
    two = make_folder(tmp_path / "two", NAMES[::-1])
    assert sha256_of(one) == sha256_of(two)
    two_renamed = two / "b.txt"
    two_renamed.rename(two / "c.txt")
    assert sha256_of(one) != sha256_of(two)


def test_hash_of_a_folder_is_what_sha256sum_says_of_its_list(tmp_path):
    folder = make_folder(tmp_path / "one", NAMES)
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(NAMES)  # by code points of the relative path
    ]
    assert sha256_of(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="sha256sum is not installed")
def test_hash_of_a_folder_by_hand(tmp_path):
    folder = make_folder(tmp_path / "one", NAMES)
    command = "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    output = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert sha256_of(folder) == output.split()[0]


def test_dot_files_and_folders_are_no_part_of_a_source(tmp_path):
    folder = make_folder(tmp_path / ".hidden" / "one", NAMES)
    before = sha256_of(folder)
    make_folder(folder, [".DS_Store", ".git/HEAD", "a/.cache/x"])
    assert sha256_of(folder) == before
    assert [path.relative_to(folder).as_posix() for path in files_below(folder)] == sorted(NAMES)
    assert files_below(folder / "b.txt") == [folder / "b.txt"]


def test_json_is_written_sorted_readable_and_read_back(tmp_path):
    value = {"b": [1, None, 0.1], "a": {"ß": "é\n"}}
    write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_text(encoding="utf-8").startswith('{\n  "a": {\n    "ß": "é\\n"\n  },')
    assert read_json(tmp_path / "x.json") == value


def test_jsonl_is_written_a_row_a_line_and_read_back(tmp_path):
    rows = [{"text": "one\ntwo\u2028three", "n": 1}, {"text": "é", "n": 2}]
    assert write_jsonl(tmp_path / "x.jsonl", iter(rows)) == 2
    assert list(read_jsonl(tmp_path / "x.jsonl")) == rows


def test_rows_that_fail_half_way_leave_the_old_file(tmp_path):
    def failing():
        yield {"n": 1}
        raise UserError("row 2 is bad")

    write_jsonl(tmp_path / "x.jsonl", [{"n": 0}])
    with pytest.raises(UserError):
        write_jsonl(tmp_path / "x.jsonl", failing())
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [{"n": 0}]
    assert names(tmp_path) == ["x.jsonl"]


def test_broken_line_of_our_own_file_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": 1}\n{"n":')
    with pytest.raises(UserError) as caught:
        list(read_jsonl(path))
    assert str(caught.value) == f"{path}, line 2: not JSON (Expecting value); delete the file to make it anew"


@pytest.mark.parametrize("made_of_it", [None, OSError("the loader's own words")])
def test_what_a_check_finds_comes_before_what_was_made_of_bad_files(made_of_it):
    def check():
        raise UserError("this file is bad")

    def load():
        with meanwhile(check):
            if made_of_it:
                raise made_of_it

    with pytest.raises(UserError, match="this file is bad"):
        load()


def test_without_a_finding_an_error_is_the_blocks_own_and_the_check_is_waited_for():
    ended = []

    def check():
        time.sleep(0.2)
        ended.append(True)

    with meanwhile(check):
        pass
    with pytest.raises(OSError, match="its own"), meanwhile(check):
        raise OSError("its own")
    assert ended == [True, True]


def test_a_request_to_stop_does_not_wait_for_a_check():
    go_on, ended = threading.Event(), []

    def check():
        go_on.wait(60)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt), meanwhile(check):
        raise KeyboardInterrupt
    assert not ended
    go_on.set()


STOPPED = """
import os, signal, sys
from pathlib import Path
from qlora.files import meanwhile, sha256_of_files

def stop(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, 0.3)
never = Path(sys.argv[1])
try:
    with meanwhile(lambda: sha256_of_files([never])) if sys.argv[2] == "beside" else open(os.devnull):
        sha256_of_files([never])
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("where", ["alone", "beside"])
def test_a_process_that_hashes_ends_when_it_is_told_to(tmp_path, where):
    os.mkfifo(tmp_path / "never")  # whoever reads it waits for a writer
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "never"), where]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "scripts")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


def test_the_first_bad_file_by_name_is_named(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    hashes = {name: sha256_of_file(tmp_path / name) for name in "cba"}
    check_files(tmp_path, hashes, "source.json")
    (tmp_path / "c").write_text("other")
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match=r"/b is not the file that source\.json names"):
        check_files(tmp_path, hashes, "source.json")
