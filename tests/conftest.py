import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: those of a GPU run without one

import pytest
import torch
from hypothesis import settings
from torch._dynamo import guards

from qpass.backends import cpu

settings.register_profile("qpass", deadline=None)  # of the clock, which says nothing where cores are shared
settings.load_profile("qpass")
gc.set_threshold(10_000, 20, 50)  # a capture makes objects by the hundred thousand, and keeps them: 5 % of its time
# after each capture torch empties the processor's cache and times the guards, for its log alone: 17 ms
if hasattr(guards, "profile_guard_manager"):
    guards.profile_guard_manager = lambda *_: 0.0


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state and an empty front end."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def kernels_of_ours(monkeypatch):
    """Convolutions run on these where there is AMX too, for which the backend takes oneDNN's else."""
    monkeypatch.setattr(cpu, "has_amx", lambda: False)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Measured times go to a folder of the test run."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
