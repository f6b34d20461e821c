"""Files that are there whole or not at all."""

import os

import pytest

from lq.atomic import write_file, write_text


def test_a_file_is_replaced_and_its_directory_made(tmp_path):
    for text in ("one", "two"):
        write_text(tmp_path / "deep" / "file", text)
        assert (tmp_path / "deep" / "file").read_text() == text
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file"]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    def fails(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    write_text(tmp_path / "file", "whole")
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", fails)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("relative", [False, True])
def test_a_target_that_is_a_directory_is_named(tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    target = os.path.relpath(tmp_path / "plan.json") if relative else tmp_path / "plan.json"
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_text(target, "text")
    assert error.value.filename == str(target)
    assert error.value.filename2 is None
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere: no directory is closed to it")
def test_a_target_in_a_directory_that_cannot_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError) as error:
        write_text(tmp_path / "plan.json", "text")
    assert error.value.filename == str(tmp_path / "plan.json")


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        write_file(tmp_path / "file", lambda _: (tmp_path / "missing").read_text())
    assert error.value.filename == str(tmp_path / "missing")
