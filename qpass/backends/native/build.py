"""Build the native kernels of the cpu backend with the machine's C++ compiler, once, and load them.

The sources lie in `src/`. The library is cached in the user's cache folder under a hash of sources, compiler and processor,
and checked on a small product before it is used. It is plain C behind ctypes, so it needs no header of torch and no
particular version of it. Without a compiler or AVX-512 VNNI nothing is lost but speed: `unavailable` says why, and the
backend uses oneDNN and generated kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qpass.backends.native.arguments import LINEAR

LOG = logging.getLogger("qpass")
SOURCES = Path(__file__).parent / "src"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w")
REQUIRED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
TIMEOUT = 300


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """Name and feature flags of the processor, as Linux tells them; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    # last what platform says: it starts a process to find out
    name = found.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(found.get("flags", "").split())


@functools.cache
def unavailable() -> str | None:
    """None where the kernels run on this machine, or why not. Builds them the first time."""
    missing = [flag for flag in REQUIRED if flag not in processor()[1]]
    if missing:
        return f"this processor lacks {', '.join(missing)}"
    try:
        return _wrong(library())
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = f"the native kernels could not be built: {error}"
        LOG.warning("%s; oneDNN and generated kernels are used", reason)
        return reason


def has_attention() -> bool:
    """Whether the attention kernel is part of the library: it needs AVX-512 BF16."""
    return unavailable() is None and hasattr(library(), "qpass_attention")


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library."""
    return ctypes.CDLL(str(_built()))


def cache_folder() -> Path:
    """Where qpass keeps what it built and measured: a folder in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "qpass"


def _built() -> Path:
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (g++, clang++ or $CXX)")
    files = sorted(SOURCES.glob("*"))
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=TIMEOUT, check=True).stdout
    key = hashlib.blake2b(digest_size=12)
    name, flags = processor()
    for part in (version, *(f.read_bytes() for f in files), " ".join((*FLAGS, name, *sorted(flags))).encode()):
        key.update(part)
    target = cache_folder() / f"native-{key.hexdigest()}.so"
    if target.is_file():
        return target
    return _compile(compiler, [str(f) for f in files if f.suffix == ".cpp"], target)


def _compile(compiler: str, files: list[str], target: Path) -> Path:
    """Writes the library beside its place and moves it there; a read-only cache costs a build a process.

    Each file is compiled by itself, as many at a time as there are processors.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    except OSError:
        target = Path(tempfile.mkdtemp(prefix="qpass-")) / target.name
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    try:
        with tempfile.TemporaryDirectory(prefix="qpass-") as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [os.path.join(folder, f"{Path(file).stem}.o") for file in files]
            list(pool.map(lambda file, made: _run([compiler, *FLAGS, "-c", file, "-o", made]), files, objects))
            _run([compiler, *FLAGS, *objects, "-o", name])
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")


def _wrong(loaded: ctypes.CDLL) -> str | None:
    """None where a small product of extreme codes comes out exact."""
    n, k = 70, 37
    x = torch.full((7, k), 255, dtype=torch.uint8)
    weight = torch.full((n, k), -127, dtype=torch.int8)
    weight[:, ::2] = 127
    packed, ones, out = pack(loaded, weight), torch.ones(n), torch.empty(7, n)
    zeros, offset = torch.zeros(n), torch.zeros(n, dtype=torch.int32)
    pointers = [t.data_ptr() if t is not None else 0 for t in (x, packed, ones, zeros, None, offset, None, None, out)]
    loaded.qpass_linear(LINEAR.pack(*pointers, 7, n, k, k, n, n, 0, 0, 0, 0, 1, 1.0, 0.0))
    wanted = x.double() @ weight.double().t()
    return None if torch.equal(out.double(), wanted) else "the native kernels computed a product wrongly"


def pack(loaded: ctypes.CDLL, weight: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] -> int8 [ceil(N / 64), ceil(K / 4), 64, 4], zero padded: the layout of src/linear.cpp."""
    n, k = weight.shape
    packed = torch.zeros((n + 63) // 64, (k + 3) // 4, 64, 4, dtype=torch.int8)
    source = weight.contiguous()
    loaded.qpass_pack_weight(
        ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(packed.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(k)
    )
    return packed


def pack_by_rows(weight: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] -> int8 [ceil(N / 64), K, 64], zero padded: the weight-only layout of src/linear.cpp."""
    n, k = weight.shape
    padded = torch.zeros((n + 63) // 64 * 64, k, dtype=torch.int8)
    padded[:n] = weight
    return padded.view(-1, 64, k).transpose(1, 2).contiguous()
