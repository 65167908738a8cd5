"""What a test may expect of the processor it runs on."""

import pytest

from qpass.backends import cpu

needs_bytes = pytest.mark.skipif(
    cpu.saturates(), reason="u8 x i8 products saturate on this processor: they stay with their reference"
)
