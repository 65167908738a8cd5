"""Measured configurations of a GPU that is not here, for tests."""

import json
from dataclasses import replace

from qpass_kernels import measured
from qpass_kernels.configs import Config
from qpass_kernels.launch import Chip
from qpass_kernels.measured import known, remember, user_file

CHIP = Chip("Test GPU (80 GB)", (9, 0), 132, 232448)
ONE = Config("streamed", 16, 64, 128, 2, warps=4, stages=5)
TWO = replace(ONE, stages=3)


def fresh(chip=CHIP, fields=None):
    """What a new process finds, after the fields of the file were changed."""
    path = user_file(chip)
    if fields:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    measured.forget()
    return known("w4a16", 1, 64, 256, chip)


def keep(config=ONE, key=("w4a16", 16, 64, 256)):
    remember({key: (config, 3.25)}, CHIP)
