"""`cllm.files.inside`: names in files do not lead out of their folder."""

from pathlib import Path

import pytest

from cllm.errors import UserError
from cllm.faults import explain
from cllm.files import inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1f").write_text("a blob")
    folder = tmp_path / "snapshots" / "main"
    (folder / "parts").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["a.bin", "parts/a.bin", "..a", "a..b/c", ".hidden"])
def test_a_plain_name_is_joined(folder: Path, name: str) -> None:
    assert inside(folder, name, written_in="index.json") == folder / name


LEAVING = ["", ".", "..", "../a", "parts/../../a", "/etc/passwd", "parts//a", "parts/", "./a", "a\0b", "..\\a", 7, None]


@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_may_leave_is_refused_in_one_line(folder: Path, name) -> None:
    with pytest.raises(UserError, match=r"^index\.json: names .*; allowed: names of files in [^\n]*$"):
        inside(folder, name, written_in="index.json")


def test_a_long_name_is_cut_in_the_message(folder: Path) -> None:
    with pytest.raises(UserError) as refused:
        inside(folder, "../" * 10_000, written_in="index.json")
    assert len(str(refused.value)) < 300 + len(str(folder))


def test_a_link_at_the_end_may_be_read_and_not_written(folder: Path) -> None:
    """The folders of the Hugging Face cache consist of links to ../../blobs."""
    (folder / "a.bin").symlink_to("../../blobs/1f")
    assert inside(folder, "a.bin", written_in="index.json").read_text() == "a blob"
    with pytest.raises(UserError, match=r"a\.bin: leads out of .* through a symbolic link"):
        inside(folder, "a.bin", written_in="index.json", to_write=True)


def test_a_link_to_a_folder_outside_is_refused_on_the_way(folder: Path) -> None:
    (folder / "out").symlink_to("../../blobs")
    with pytest.raises(UserError, match=r"out: leads out of .* through a symbolic link"):
        inside(folder, "out/1f", written_in="index.json")


def test_a_link_that_stays_inside_may_be_written_to(folder: Path) -> None:
    (folder / "same").symlink_to("parts")
    assert inside(folder, "same/a", written_in="--name", to_write=True) == folder / "same" / "a"


def test_the_folder_itself_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert inside(tmp_path / "link", "parts/a", written_in="--name", to_write=True) == tmp_path / "link" / "parts" / "a"


def test_a_link_to_itself_is_one_line_of_the_machine(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop") as raised:
        inside(folder, "loop", written_in="--name", to_write=True)
    assert "loop: cannot be used: Too many levels of symbolic links" in (explain(raised.value) or "")
