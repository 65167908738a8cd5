"""Documents of reports as large and as odd as the page's tests need, made without a model: shaped as a Llama's is."""

import math
import random

LEVELS = (
    ("float", "capture"),
    ("annotated", "annotate"),
    ("qdq", "insert_qdq"),
    ("fused", "fuse"),
    ("lowered", "lower"),
)
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj")  # fmt: skip
FRONT = {
    "unit": "bytes", "metric": "kl", "points": [{"cost": 10.0 + i, "loss": 4.0**-i} for i in range(8)],
    "chosen": {"cost": 13.0, "predicted": 4.0**-3, "loss": 0.01},
}  # fmt: skip
NORM = ("pow", "mean", "add", "rsqrt", "mul", "mul")
ROTARY = ("slice", "slice", "neg", "cat", "mul", "mul", "add")


class Level:
    """A level's nodes, as they are written down one after another."""

    def __init__(self, name):
        self.name, self.nodes = name, []

    def add(self, op, inputs=(), module="", site=None, rule=None, kind="call", shape=(1, "s0", 64)):
        number = len(self.nodes)
        arguments = ", ".join(f"%{i}" for i in inputs)
        text = f"@{op}" if kind == "parameter" else f"%{number} = {op}({arguments})"
        self.nodes.append(
            {"id": number, "op": op, "text": text, "module": module, "site": site, "rule": rule, "dtype": "float32",
             "shape": list(shape), "inputs": list(inputs), "kind": kind}
        )  # fmt: skip
        return number

    def chain(self, ops, x, module):
        for op in ops:
            x = self.add(f"aten.{op}", (x,), module)
        return x

    def linear(self, x, module):
        """A linear with what each level makes of it."""
        weight = self.add(f"{module}.weight", (), module, kind="parameter", shape=(64, 64))
        site = None if self.name == "float" else f"{module}:linear.0"  # as the pipeline tells them
        if "up_proj" in module:  # stays float
            return self.add("aten.linear", (x, weight), module, site)
        if self.name == "qdq":
            x = self.add("qpass.quantize", (x,), module, site, "insert_qdq")
            x = self.add("qpass.dequantize", (x,), module, site, "insert_qdq")
            weight = self.add("qpass.dequantize", (weight,), module, site, "insert_qdq")
        op = {"fused": "qpass.linear", "lowered": "qpass.linear_w8a8"}.get(self.name, "aten.linear")
        rule = "integer_linear" if op != "aten.linear" else None
        return self.add(op, (x, weight), module, site, rule)


def level(name, after, layers, extra):
    """The nodes of one level; extra: operations added to each layer's attention."""
    g = Level(name)
    ids = g.add("input_ids", kind="input", shape=(1, "s0"))
    table = g.add("model.embed_tokens.weight", (), "model.embed_tokens", kind="parameter")
    x = g.add("aten.embedding", (table, ids), "model.embed_tokens")
    for i in range(layers):
        at = f"model.layers.{i}"
        h = g.chain(NORM, x, f"{at}.input_layernorm")
        q, k, v = (g.linear(h, f"{at}.self_attn.{n}_proj") for n in "qkv")
        q, k = (g.chain(ROTARY, each, f"{at}.self_attn") for each in (q, k))
        a = g.add("aten.scaled_dot_product_attention", (q, k, v), f"{at}.self_attn")
        a = g.chain(("view", "transpose", "mul", "add", "reshape") * (extra // 5), a, f"{at}.self_attn")
        x = g.add("aten.add", (x, g.linear(a, f"{at}.self_attn.o_proj")), at)
        h = g.chain(NORM, x, f"{at}.post_attention_layernorm")
        gate = g.add("aten.silu", (g.linear(h, f"{at}.mlp.gate_proj"),), f"{at}.mlp.act_fn")
        h = g.add("aten.mul", (gate, g.linear(h, f"{at}.mlp.up_proj")), f"{at}.mlp")
        x = g.add("aten.add", (x, g.linear(h, f"{at}.mlp.down_proj")), at)
    x = g.linear(g.chain(NORM, x, "model.norm"), "lm_head")
    g.add("output", (x,), kind="output")
    return {"level": name, "after": after, "nodes": g.nodes}


def site(module, index, rng):
    """A site with every figure measured; those that project up stay float."""
    quantized = "up_proj" not in module
    lo, hi = -1 - 4 * rng.random(), 1 + 5 * rng.random()
    counts = [int(900 * math.exp(-(((i - 30) / 9) ** 2))) + rng.randrange(4) for i in range(64)]
    xs = [rng.gauss(0, 1) for _ in range(150)]
    width = [0.2 + rng.random() for _ in range(64)]
    measured = {
        "range": [lo, hi], "scale": (hi - lo) / 255, "zero_point": round(-lo / ((hi - lo) / 255)),
        "group": f"model.layers.{index // 7}.self_attn.q_proj:linear.0" if index % 7 in (1, 2) else None,
        "clipped": rng.random() / 300, "sqnr": 18 + 30 * rng.random(), "cosine": 1 - rng.random() / 1000,
        "worst": rng.random(), "loss_alone": 10 ** (-6 + 4 * rng.random()), "loss_without": 0.01 + rng.random() / 100,
        "milliseconds": 0.02 + rng.random(), "roofline": rng.random(),
        "input_histogram": {"lo": lo * 1.05, "hi": hi * 1.05, "counts": counts},
        "weight_channels": {"lo": [-w for w in width], "hi": [w * 0.9 for w in width], "scale": [w / 127 for w in width],
                            "of": 4096},
        "weight_histogram": {"lo": -1.2, "hi": 1.2, "counts": counts},
        "scatter": {"float": xs, "quantized": [x + rng.gauss(0, 0.05) for x in xs]},
    }  # fmt: skip
    if not quantized:
        nothing = dict.fromkeys(measured)
        measured = {**nothing, "range": measured["range"], "input_histogram": measured["input_histogram"]}
    return {
        "site": f"{module}:linear.0", "module": module, "operation": "linear", "quantized": quantized,
        "weight_type": "i8/c0" if quantized else None, "input_type": "u8/t" if quantized else None, "shape": [4096, 4096],
        "parameters": 4096 * 4096, "multiply_adds": 4096 * 4096 * 128, "bytes_float": 4 * 4096 * 4096,
        "bytes": 4096 * 4096 + 4 * 4096 if quantized else 4 * 4096 * 4096, **measured,
        "source": {"file": "modeling_llama.py", "line": 240 + index % 7, "code": "q = self.q_proj(hidden_states)"},
        "why_float": None if quantized else "its input's range is too wide: 3 of 4096 channels reach 40 times the median",
        "note": "range cut to the 99.99th percentile" if index % 4 == 0 else None,
        "rules": ["integer_linear", "linear_silu"] if index % 7 == 4 else ["integer_linear"],
        "missed": [{"rule": "linear_residual", "why": "linear has 2 users, a fused value must have one"}],
        "kept": ["the CPU has no VNNI: the reference multiplies"] if index % 50 == 7 else [],
    }  # fmt: skip


def document(layers=2, extra=0, model="LlamaForCausalLM"):
    """A report of a model with so many layers: 5 levels, 7 sites a layer and the head's."""
    rng = random.Random(0)
    modules = [f"model.layers.{i}.{name}" for i in range(layers) for name in LINEARS] + ["lm_head"]
    sites = [site(module, i, rng) for i, module in enumerate(modules)]
    done = [s for s in sites if s["quantized"]]
    summary = {
        "model": model, "scheme": "w8a8", "backend": "cpu", "qpass": "0.1.0", "torch": "2.13.0",
        "parameters": {"all": sum(s["parameters"] for s in sites) + 9000, "quantized": sum(s["parameters"] for s in done)},
        "multiply_adds": {"all": sum(s["multiply_adds"] for s in sites),
                          "quantized": sum(s["multiply_adds"] for s in done)},
        "bytes": {"float": sum(s["bytes_float"] for s in sites), "quantized": sum(s["bytes"] for s in sites)},
        "sites": {"quantized": len(done), "float": len(sites) - len(done)}, "metric": "kl", "loss": 0.0123,
        "milliseconds": {"float": 41.8, "quantized": 16.2}, "batches": 64,
        "notes": ["the guard compared 64 outputs: the largest difference is 0.031"],
    }  # fmt: skip
    levels = [level(name, after, layers, extra) for name, after in LEVELS]
    passes = [{"name": after, "level": name, "edits": 7, "seconds": 0.01} for name, after in LEVELS]
    graph = {"name": "graph0", "seconds": 1.25, "passes": passes, "levels": levels}
    return {"format": "qpass-report", "version": 1, "summary": summary, "sites": sites, "graphs": [graph],
            "front": FRONT}  # fmt: skip


def large():
    """As large as a Llama of 32 layers: 225 sites, 10,000 nodes and a few at each level."""
    return document(32, 270)


def unmeasured(layers=1):
    """Nothing was measured: every figure that may be null is."""
    found = document(layers)
    for key in ("multiply_adds", "metric", "loss", "milliseconds"):
        found["summary"][key] = None
    found["summary"]["notes"] = []
    fixed = {"site", "module", "operation", "quantized", "shape", "parameters", "rules", "missed", "kept"}
    empty = {"shape": [], "rules": [], "missed": [], "kept": []}
    found["sites"] = [{**dict.fromkeys(s), **{k: s[k] for k in fixed}, **empty} for s in found["sites"]]
    for graph in found["graphs"]:
        for each in graph["levels"]:
            each["nodes"] = [{**n, "dtype": None, "shape": None, "rule": None} for n in each["nodes"]]
    return found
