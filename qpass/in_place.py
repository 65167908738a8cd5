"""A model packed in place while it is decided on: the float weights of a group are gone before the next one is looked at.

Memory stays at the float model's own size. For calls without data alone: nothing runs through the model in between. An
interrupt leaves a model that is packed in part, as its float weights are nowhere any more; it is told to load it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager

from torch import Tensor, nn

from qpass.install import install, packed_weights
from qpass.passes.other_sites import LOOKUP
from qpass.plan import Decision
from qpass.site_info import SiteInfo

IN_PART = "qpass: the weights of this {} are packed in part, and their float values are gone; load the model again."


def pack_now(
    model: nn.Module, weights: MutableMapping[str, Tensor], decisions: Iterable[Decision], sites: Iterable[SiteInfo]
) -> None:
    """Packs what was decided, and forgets the float weights; those that lookups read too are decided on later."""
    tables = {info.weight for info in sites if info.operation == LOOKUP}
    packed = {d.weight: d.packed for d in decisions if d.packed is not None and d.weight not in tables}
    install(model, packed)
    for name in packed:
        weights.pop(name, None)


@contextmanager
def told_if_in_part(model: nn.Module) -> Iterator[None]:
    """An error or interrupt on the way says what has become of the model."""
    try:
        yield
    except BaseException as error:
        if packed_weights(model):
            error.add_note(IN_PART.format(type(model).__name__))
        raise
