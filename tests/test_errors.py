"""The exception type and its spelling suggestions."""

from qpass.errors import QpassError, nearest


def test_is_a_value_error():
    assert issubclass(QpassError, ValueError)


def test_nearest_suggests_the_closest_choice():
    assert nearest("w8a8-dinamic", ("w8a8", "w8a8-dynamic", "fp8")) == " Did you mean 'w8a8-dynamic'?"


def test_nearest_is_silent_without_a_close_choice():
    assert nearest("zzz", ("w8a8", "fp8")) == ""
    assert nearest("zzz", ()) == ""
