"""Only regular files are opened, and what is printed cannot control a terminal."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from danqing.escaping import escape
from danqing.files import open_regular, read_regular


def test_a_regular_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_regular(tmp_path / "link") == b"12345"
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(tmp_path / "file", 4)


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    for path, kind in [
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path / "socket", "a socket"),
        (Path("/dev/zero"), "a character device"),
        (tmp_path, "a folder"),
    ]:
        with pytest.raises(OSError, match=f"not a regular file but {kind}"):
            open_regular(path)
    listening.close()


def test_controls_are_escaped() -> None:
    assert escape("plain, 三座蓝山 é\n\t👩‍🎨") == "plain, 三座蓝山 é\n\t👩‍🎨"
    assert escape("\x1b]0;title\x07\x9b2J\r") == "\\x1b]0;title\\x07\\x9b2J\\x0d"
    assert escape("\u202egnp.exe\u2066\u200b\ufeff") == "\\u202egnp.exe\\u2066\\u200b\\ufeff"
    assert escape("\ud800\U000e0041\u2028") == "\\ud800\\U000e0041\\u2028"
    assert escape("a\nb", one_line=True) == "a\\x0ab"
