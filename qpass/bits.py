"""How many bits are read of nested weights (w{8,4,2}a16): set for a model, or asked for by one request.

    qpass.set_bits(q, 4)                      from now on, for every call of the model
    qpass.set_bits(q, 2, "blocks.*.mlp.*")    some sites: globs as in a recipe
    with qpass.at_bits(q, 2): q(x)            calls made inside, in this thread or asyncio task; other calls are not disturbed

Nothing is copied, captured or compiled anew: each weight has a tensor of one number beside it, which its op reads as it runs.
A thread that is started inside `at_bits` begins with what the model is set to, as threads do with context variables.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from qpass.errors import QpassError, nearest
from qpass.install import PackedWeight, packed_weights
from qpass.nested_ops import bits_now, using
from qpass.runtime import runtime_of


def set_bits(model: nn.Module, bits: int, sites: str = "*") -> dict[str, int]:
    """Reads `bits` of the nested weights of the sites that match from now on; returns path of weight -> bits for all of them.

    A call that runs meanwhile in another thread may read some weights before and some after: `at_bits` is for that.
    """
    for form in _asked(model, bits, sites).values():
        form.bits.fill_(bits)
    return bits_set(model)


@contextmanager
def at_bits(model: nn.Module, bits: int, sites: str = "*") -> Iterator[None]:
    """Within it this thread's, or task's, calls of the model read `bits` of the nested weights of the sites that match."""
    held: list[Tensor] = [form.bits for form in _asked(model, bits, sites).values()]
    with using({tensor.data_ptr(): bits for tensor in held}):
        yield


def bits_of(model: nn.Module) -> dict[str, int]:
    """Path of each nested weight -> the bits that a call reads of it here and now."""
    return {path: bits_now(form.bits) for path, form in nested_weights(model).items()}


def bits_set(model: nn.Module) -> dict[str, int]:
    """Path of each nested weight -> the bits that the model is set to, whatever a request asks for."""
    return {path: int(form.bits) for path, form in nested_weights(model).items()}


def nested_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Path of each nested weight (`module.attribute`) -> its parametrization."""
    return {path: form for path, form in packed_weights(model).items() if form.widths}


def _asked(model: nn.Module, bits: int, sites: str) -> dict[str, PackedWeight]:
    """The weights that match, all of which can be read so."""
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise QpassError(f"model is a {type(model).__name__}; expected one that qpass.compile made.")
    forms = nested_weights(model)
    if not forms:
        raise QpassError(_why_none(model))
    names = _sites(model, forms)
    found = {path: form for path, form in forms.items() if any(_matches(name, sites) for name in names[path])}
    if not found:
        known = [name if ":" in sites else name.partition(":")[0] for path in names for name in names[path]]
        raise QpassError(f"no nested weight is read by a site that matches {sites!r}.{nearest(sites, known)}")
    for path, form in found.items():
        if isinstance(bits, bool) or bits not in form.widths:
            widths = ", ".join(map(str, form.widths))
            raise QpassError(f"{path} is packed to be read at {widths} bits, not {bits!r}; compile it with that width.")
    return found


def _why_none(model: nn.Module) -> str:
    kind = type(model).__name__
    if packed_weights(model):
        return f"the weights of this {kind} have one width; compile it with a scheme such as w{{8,4,2}}a16 to choose later."
    return f"this {kind} has float weights; compile it first: q = qpass.compile(model, 'w{{8,4,2}}a16')."


def _sites(model: nn.Module, forms: dict[str, PackedWeight]) -> dict[str, list[str]]:
    """Path of each nested weight -> the sites that read it, and its module."""
    runtime = runtime_of(model)
    names = {path: [path.rpartition(".")[0]] for path in forms}
    for d in () if runtime is None else runtime.plan:
        for path, form in forms.items():
            if d.weight == path or (d.weight in forms and forms[d.weight].bits is form.bits):
                names[path].append(d.site)
    return names


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name if ":" in glob else name.partition(":")[0], glob)
