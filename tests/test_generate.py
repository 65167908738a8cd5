"""generate() of quantized language models, without data: the tokens of the packed model in eager mode, in a few graphs."""

import dataclasses

import pytest
import torch
from torch import nn

import qpass
from qpass.runtime import runtime_of
from tests.models_generate import build, prompt
from tests.processors import needs_bytes

LENGTH = 24
GREEDY, SAMPLED, BEAM = dict(do_sample=False), dict(do_sample=True, top_k=0), dict(do_sample=False, num_beams=3)
STATIC, PADDED = dict(cache_implementation="static"), dict(padded=True)
# architecture, scheme, backend, ways to generate: each architecture and each way, not every pair
CASES = (
    ("llama", "w4a16-g32", "cpu", (GREEDY, SAMPLED, BEAM)),
    ("qwen2", "w8a16", "reference", (GREEDY | STATIC | PADDED, BEAM | STATIC)),
    ("qwen3", "w4a16-g32", "reference", (GREEDY | STATIC, SAMPLED | STATIC)),
    ("mistral", "w8a16", "reference", (BEAM | PADDED,)),
    ("gemma", "w4a16-g32", "reference", (GREEDY, SAMPLED)),
    ("gemma3", "w8a16", "reference", (GREEDY | STATIC,)),
    ("gpt2", "w4a16-g32", "reference", (SAMPLED | PADDED,)),
    ("phi", "w8a16", "reference", (SAMPLED, BEAM)),
    ("t5", "w4a16-g32", "reference", (BEAM, SAMPLED)),
    ("whisper", "w8a16", "reference", (GREEDY | STATIC, BEAM | STATIC)),
)


def generate(model, inputs, options, length=LENGTH):
    """(tokens, logits of each step), seeded; no token ends a row."""
    torch.manual_seed(5)
    wanted = dict(max_new_tokens=length, min_new_tokens=length, eos_token_id=None)
    out = model.generate(**inputs, **options, **wanted, return_dict_in_generate=True, output_logits=True)
    return out.sequences, out.logits


def eager(q):
    """The packed model, called without its compiled graphs."""
    q._compiled_call_impl = None
    return q


@pytest.mark.parametrize(("name", "scheme", "backend", "ways"), CASES, ids=[c[0] for c in CASES])
def test_tokens_of_the_eager_packed_model(name, scheme, backend, ways):
    q = qpass.compile(build(name), scheme, backend=backend)
    runs = []
    for way in ways:
        options = dict(way)
        inputs = prompt(name, padded=options.pop("padded", False))
        runs.append((inputs, options, *generate(q, inputs, options)))
    assert runtime_of(q).records
    for inputs, options, tokens, logits in runs:
        wanted, theirs = generate(eager(q), inputs, options)
        assert len(tokens.unique()) > 5
        assert torch.equal(tokens, wanted)
        for a, b in zip(logits, theirs, strict=True):
            assert float((a - b).abs().max()) < 1e-4 * float(b[b.isfinite()].std())


def test_inputs_quantized_at_run_time():
    """In eager mode their inputs stay float, so each step is compared with the reference backend on the same tokens."""
    q = qpass.compile(build("llama"), "w8a8-dynamic", backend="cpu")
    tokens, logits = generate(q, prompt("llama"), GREEDY)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = qpass.compile(build("llama"), "w8a8-dynamic", backend="reference")(input_ids=tokens).logits[:, 6:-1]
    assert float((torch.stack(logits, 1) - wanted).norm() / wanted.norm()) < 0.02


# architecture, cache, graphs: one of a prompt, a token, an encoder; a window has more, as it fills, is full, lets tokens fall
GRAPHS = (("llama", {}, 2), ("llama", STATIC, 2), ("mistral", {}, 5), ("t5", {}, 4), ("whisper", STATIC, 3))


@pytest.mark.parametrize(("name", "options", "graphs"), GRAPHS)
def test_graphs_of_200_tokens(name, options, graphs):
    q = qpass.compile(build(name), "w8a16", backend="reference")
    tokens, _ = generate(q, prompt(name, length=5), options | GREEDY, 200)
    assert tokens.shape[1] >= 200
    assert len(runtime_of(q).records) == graphs
    generate(q, prompt(name, length=6), options | GREEDY, 150)
    assert len(runtime_of(q).records) == graphs


class Modes(nn.Module):
    """A model with a graph for each word it is given."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, mode):
        return self.inner(x) * len(mode)


def test_more_graphs_than_the_front_end_keeps_by_itself():
    """Batch 1, a prompt or a token, each kind of cache, mask and window have one: it would stop at eight, in eager mode."""
    q = qpass.compile(Modes().eval(), "w8a16", backend="reference")
    for length in range(1, 21):
        q(torch.randn(3, 8), "m" * length)
    assert len(runtime_of(q).records) == 20


class Kept:
    """A backend that notes the large constants of each graph it finishes: where the values lie -> the tensor."""

    def __init__(self, q):
        self.graphs = []
        self.runtime = runtime_of(q)
        self.finish = self.runtime.backend.finish
        self.runtime.backend = dataclasses.replace(self.runtime.backend, finish=self.note)

    def note(self, gm):
        read = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
        held = [gm.get_buffer(name) for name in read]
        large = [t for t in held if t.is_mkldnn or t.nbytes >= 4096]
        self.graphs.append({id(t) if t.is_mkldnn else t.data_ptr(): t for t in large})
        return self.finish(gm)


@needs_bytes
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dynamic", "w4a16-g32"])
def test_graphs_share_what_the_backend_laid_out(scheme, monkeypatch):
    monkeypatch.setattr("qpass.backends.cpu.compile_region", lambda part: part.forward)
    q = qpass.compile(build("qwen3"), scheme, backend="cpu", recipe={"lm_head": scheme})
    kept = Kept(q)
    with torch.no_grad():
        for ids in (torch.randint(3, 128, (2, 9)), torch.randint(3, 128, (1, 5))):
            q(input_ids=ids, use_cache=False)
    first, second = kept.graphs
    assert second.keys() == first.keys()
    if scheme != "w4a16-g32":  # its codes are too few to be counted
        assert len(first) >= 8


def test_models_share_equal_constants_only(monkeypatch):
    """Two models of one seed share; one of another seed does not."""
    monkeypatch.setattr("qpass.backends.cpu.compile_region", lambda part: part.forward)
    held = []
    for seed in (0, 0, 1):
        torch._dynamo.reset()
        q = qpass.compile(build("llama", seed), "w8a8-dynamic", backend="cpu")
        kept = Kept(q)
        with torch.no_grad():
            q(input_ids=torch.arange(3, 12)[None])
        held.append((q, kept.graphs[0]))
    assert held[0][1].keys() == held[1][1].keys()
    assert not held[0][1].keys() & held[2][1].keys()
