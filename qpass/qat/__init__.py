"""Quantization-aware training: fake-quantized modules, subgradients, and what helps a training along.

t = qpass.prepare_qat(model, "w4a4", example_inputs)
optimizer = torch.optim.AdamW(qpass.qat.param_groups(t, lr=1e-3))
...  # any training loop
q = qpass.compile(t.eval())
"""

from qpass.qat.distill import Distillation, distillation_loss
from qpass.qat.groups import param_groups
from qpass.qat.norms import freeze_norms, reestimate_norms
from qpass.qat.oscillation import Oscillation, damping
from qpass.qat.switch import switch
from qpass.qat.training import float_model

__all__ = [
    "Distillation",
    "Oscillation",
    "damping",
    "distillation_loss",
    "float_model",
    "freeze_norms",
    "param_groups",
    "reestimate_norms",
    "switch",
]
