"""Five shapes of public logs end in the dataset that a plain program makes of them; a difference is found."""

from pathlib import Path

import pytest

from tools import check_formats


def test_five_public_shapes_and_one_command_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_formats.main(["--output", str(tmp_path / "formats"), "--rows", "3000"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(check_formats.SHAPES) and all(" equal: " in line for line in lines[2:])


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(folder: Path):
        for row in check_formats.read_lists(folder):
            yield check_formats.Row(row.user, row.item, row.time + (row.user == "1"))

    monkeypatch.setattr(check_formats, "SHAPES", {"lists": (check_formats.write_lists, altered)})
    with pytest.raises(SystemExit):
        check_formats.main(["--output", str(tmp_path / "formats"), "--rows", "2000"])
