"""Kernel tests look at no measured configurations but their own."""

import pytest

from qpass_kernels import measured


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of the cache and of what ships, empty."""
    monkeypatch.setenv("QPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "tuned")
    measured.forget()
    yield tmp_path
    measured.forget()
