"""Files are written whole or not at all."""

import json
import os
import stat
import sys

import pytest

from vit.files import replacing, write_json

posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions and links of POSIX")


def test_the_new_content_takes_the_place_of_the_old(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with replacing(file) as temporary:
        assert temporary.parent == tmp_path and temporary != file
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("written", ["", "half"])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, error, written):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(error), replacing(file) as temporary:
        if written:
            temporary.write_text(written)
        raise error
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_failure_makes_no_file(tmp_path):
    with pytest.raises(ValueError), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_a_name_that_cannot_be_taken_leaves_no_temporary_file(tmp_path):
    folder = tmp_path / "a.txt"
    folder.mkdir()
    with pytest.raises(OSError), replacing(folder) as temporary:
        temporary.write_text("new")
    assert list(tmp_path.iterdir()) == [folder] and folder.is_dir()


@posix
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "blob", tmp_path / "a.txt"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and link.resolve() == target and target.read_text() == "new"
    assert {path.name for path in tmp_path.rglob("*")} == {"store", "blob", "a.txt"}


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_file(tmp_path, mask):
    """Not those of `tempfile`, which others cannot read."""
    before = os.umask(mask)
    try:
        (tmp_path / "ordinary").write_text("")
        with replacing(tmp_path / "replaced") as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "replaced")]
    assert modes == [0o666 & ~mask] * 2


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    with replacing(tmp_path / "a.txt") as one, replacing(tmp_path / "a.txt") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a.txt").read_text() == "one"  # the last to finish


def test_json_is_indented_and_ends_in_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é", "sizes": [1, 2]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "é", "sizes": [1, 2]} and text.startswith("{\n  ") and text.endswith("}\n")
