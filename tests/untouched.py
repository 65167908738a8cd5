"""What a caller can see of a model, to hold that a call left it as it was."""

import contextlib

import torch


def view(model):
    """Everything a caller can see of a model, module by module."""
    seen = {}
    for path, module in model.named_modules():
        seen[path] = {
            "class": type(module),
            "training": module.training,
            "parameters": [(n, id(p), p.requires_grad) for n, p in module._parameters.items() if p is not None],
            "buffers": [(n, id(b)) for n, b in module._buffers.items()],
            "hooks": (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)),
            "compiled": module._compiled_call_impl,
            "attributes": set(vars(module)),
        }
    return seen


@contextlib.contextmanager
def untouched(model):
    """Fails where the block changes anything of the model."""
    seen, values = view(model), {k: v.clone() for k, v in model.state_dict().items()}
    yield
    assert view(model) == seen
    found = model.state_dict()
    assert list(found) == list(values)
    for name, value in values.items():
        assert value.is_meta or torch.equal(found[name].nan_to_num(), value.nan_to_num()), name
