"""What C code prints for its developers does not reach a script's output; everything else does, in order."""

import ctypes
import os

import pytest

from packlight.planner.chatter import left_out


def test_lines_with_the_prefix_are_left_out_and_others_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    os.write(1, b"before\n")
    with left_out(b"Noise::"):
        library.printf(b"Noise::inside by C\n")
        library.printf(b"kept by C\n")
        library.fflush(None)
        os.write(1, b"kept by Python\n")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "before\nkept by C\nkept by Python\nafter\n"


def test_standard_output_is_put_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="inside"), left_out(b"Noise::"):
        raise ValueError("inside")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"
