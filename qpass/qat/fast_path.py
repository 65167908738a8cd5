"""torch's fast path of attention, which in eval mode runs a whole encoder layer as one operator on the weights as they are.

A layer with fake-quantized modules inside must not take it. Each class below asks one attribute of its own for that, and for
nothing else; on a model in training it says no, and gets its value back when the model is made float.
"""

from __future__ import annotations

from torch import nn

from qpass.qat.sites import Trained

ASKED = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),  # else 1 or 2: the one the operator is to run
    (nn.TransformerEncoder, "use_nested_tensor", False),  # packs rows without their padding, for that operator alone
)
BEFORE = "before_training"


def leave_fast_path(model: nn.Module) -> None:
    """Layers with trained modules inside run them, in place."""
    for module in model.modules():
        for kind, name, no in ASKED:
            if isinstance(module, kind) and any(isinstance(inner, Trained) for inner in module.modules()):
                vars(module)[BEFORE] = vars(module).get(name)
                setattr(module, name, no)


def allow_fast_path(model: nn.Module) -> None:
    """As it was before."""
    for module in model.modules():
        for kind, name, _ in ASKED:
            if isinstance(module, kind) and BEFORE in vars(module):
                setattr(module, name, vars(module).pop(BEFORE))
