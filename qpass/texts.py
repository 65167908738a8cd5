"""Real text that is on every machine: docstrings of the standard library."""

from __future__ import annotations

import importlib
import inspect
import random

NAMES = (
    "json os re socket ssl http.client asyncio tempfile threading subprocess logging argparse collections itertools "
    "functools statistics random decimal fractions datetime calendar zipfile tarfile sqlite3 csv configparser hashlib "
    "shutil glob pathlib pickle copy heapq queue selectors urllib.request urllib.parse xml.etree.ElementTree uuid "
    "socketserver http.cookies ipaddress locale unittest doctest pdb timeit trace ast tokenize typing contextlib "
    "dataclasses enum abc string textwrap codecs io multiprocessing concurrent.futures optparse traceback weakref"
)
MODULES = tuple(name for name in NAMES.split(" "))


def docstrings(seed: int = 0) -> list[str]:
    """Docstrings longer than 80 characters, in a fixed shuffled order."""
    found = set()
    for name in MODULES:
        try:
            members = vars(importlib.import_module(name))
        except ImportError:  # not every build of Python has all of them
            continue
        for key, value in members.items():
            if callable(value) and not key.startswith("_"):
                text = inspect.getdoc(value)
                if text and len(text) > 80:
                    found.add(text)
    texts = sorted(found)
    random.Random(seed).shuffle(texts)
    return texts
