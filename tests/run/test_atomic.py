"""Atomic files and folders: the old content or the new, never half of it."""

import pytest

from kd.run.atomic import atomic_path, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file.json"
    for text in ("old", "new"):
        write_text(path, text)
        assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    path = tmp_path / "file.json"
    write_text(path, "old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    folder, temporary = tmp_path / "rows", tmp_path / "rows.tmp-1"
    with pytest.raises(ValueError), atomic_path(folder, temporary) as aside:  # noqa: PT011
        aside.mkdir()
        (aside / "ids").write_text("half")
        raise ValueError
    assert not list(tmp_path.iterdir())
    with atomic_path(folder, temporary) as aside:
        aside.mkdir()
        (aside / "ids").write_text("whole")
        assert not folder.exists()
    assert (folder / "ids").read_text() == "whole" and not temporary.exists()
