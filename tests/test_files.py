"""Files that someone else prepared: links are not followed, nothing of others is written to or deleted."""

import os
import stat

import pytest

from granet import files
from granet.files import FileError


@pytest.fixture
def outside(tmp_path):
    file = tmp_path / "outside" / "precious.txt"
    file.parent.mkdir()
    file.write_text("precious")
    return file


def test_a_file_is_replaced_as_a_whole_with_the_users_own_mode(tmp_path):
    file = tmp_path / "summary.json"
    files.replace(file, "old")
    files.replace(file, "new")
    assert file.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "model.safetensors"
    files.replace(file, "old")
    with pytest.raises(ZeroDivisionError), files.replacing(file) as new:
        new.write(b"new")
        raise ZeroDivisionError
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_replacing_takes_the_place_of_a_link_and_leaves_what_it_led_to(tmp_path, outside):
    link = tmp_path / "engine.txt"
    link.symlink_to(outside)
    files.replace(link, "mine")
    assert outside.read_text() == "precious"
    assert not link.is_symlink() and link.read_text() == "mine"


def test_a_new_file_is_not_written_through_what_lies_there(tmp_path, outside):
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(FileExistsError):
        files.write_and_sync(tmp_path / "link", b"x")
    assert outside.read_text() == "precious"


def lock(path):
    with files.locked(path):
        pass


@pytest.mark.parametrize("use", [files.read, files.appending, lock])
def test_links_folders_and_pipes_are_not_opened(tmp_path, outside, use):
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(FileError, match=r"link is a symbolic link \(to .*precious.txt\)"):
        use(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileError, match=f"{name} is no plain file"):
            use(tmp_path / name)
    assert outside.read_text() == "precious"


def test_a_dangling_link_makes_no_file_elsewhere(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for use in (files.appending, lock):
        with pytest.raises(FileError, match="symbolic link"):
            use(tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_a_hard_link_is_parted_before_it_is_written_to(tmp_path, outside):
    os.link(outside, tmp_path / "metrics.jsonl")
    with files.appending(tmp_path / "metrics.jsonl") as file:
        file.truncate(3)
        file.write(b"!")
    assert (tmp_path / "metrics.jsonl").read_text() == "pre!"
    assert outside.read_text() == "precious"


def test_a_locked_file_keeps_its_content(outside):
    lock(outside)
    assert outside.read_text() == "precious"


def test_a_lock_is_held_once_and_then_free(tmp_path):
    with files.locked(tmp_path / "lock"), pytest.raises(BlockingIOError), files.locked(tmp_path / "lock", wait=False):
        pass
    with files.locked(tmp_path / "lock", wait=False):
        pass


def test_no_part_of_a_path_below_the_folder_is_a_link(tmp_path, outside):
    real = tmp_path / "run"
    (real / "a").mkdir(parents=True)
    (real / "a" / "b").symlink_to(outside.parent)
    way = tmp_path / "way"
    way.symlink_to(real)  # the way to the run directory is the user's own
    assert files.within(way, "a", "none") == way / "a" / "none"
    with pytest.raises(FileError, match="a/b is a symbolic link"):
        files.within(way, "a", "b", "c")
    with pytest.raises(FileError, match="symbolic link"):
        files.subfolder(real / "a", "b")
    (real / "file").write_text("")
    with pytest.raises(FileError, match="is no folder"):
        files.subfolder(real, "file")
    assert files.subfolder(real, "new").is_dir()


def test_only_folders_of_known_files_are_removed(tmp_path, outside):
    own, other, link = (tmp_path / name for name in ("own", "other", "link"))
    for folder in (own, other):
        folder.mkdir()
        (folder / "state.json").write_text("")
    (other / "thesis.tex").write_text("")
    link.symlink_to(outside.parent)
    assert files.remove(own, ["state.json", "model.safetensors"])
    assert not files.remove(other, ["state.json"])
    assert not files.remove(link, ["precious.txt"])
    assert sorted(p.name for p in other.iterdir()) == ["state.json", "thesis.tex"]
    assert outside.exists() and not own.exists()


def test_a_link_in_a_folder_is_removed_and_not_what_it_leads_to(tmp_path, outside):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "state.json").symlink_to(outside)
    assert files.remove(tmp_path / "own", ["state.json"])
    assert outside.read_text() == "precious"


def test_the_end_of_a_file(outside):
    assert files.tail(outside, 4) == b"ious"
    assert files.tail(outside, 400) == b"precious"
