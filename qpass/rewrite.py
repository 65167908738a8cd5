from __future__ import annotations
import inspect
from dataclasses import dataclass, field
import torch
from torch import fx
from qpass.arity import full_arity
aten = torch.ops.aten
COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)

@dataclass
class Match:
    rule: object; root: fx.Node; nodes: list; bound: dict

class Fail(Exception): pass

@dataclass
class RuleLog:
    hits: list = field(default_factory=list)
    misses: dict = field(default_factory=dict)
    def lines(self): return [f"{r}: {n}" for r, n in self.hits] + [f"{k[0]} at {k[1]}: {w}" for k, (w, d) in self.misses.items()]

class Rule:
    def __init__(self, pattern):
        self.pattern = pattern; self.name = pattern.__name__; self.doc = pattern.__doc__
        self.params = list(inspect.signature(pattern).parameters)
        self._check = None; self.replacement = None; self._graph = None
    def to(self, f): self.replacement = f; return self
    def check(self, f): self._check = f; return self
    @property
    def graph(self):
        if self._graph is None:
            g = fx.Graph(); tr = fx.proxy.GraphAppendingTracer(g); proxies = {p: fx.Proxy(g.placeholder(p), tr) for p in self.params}
            out = self.pattern(**proxies); g.output(out.node)
            for n in g.nodes:
                if n.op == "call_function": n.args, n.kwargs = full_arity(n.target, n.args, n.kwargs)
            self._graph = g
        return self._graph
    @property
    def root(self): return next(n for n in self.graph.nodes if n.op == "output").args[0]
def rule(f): return Rule(f)

def _m(p, v, b, nodes, root):
    if isinstance(p, fx.Node):
        if p.op == "placeholder":
            if p.name in b: return None if b[p.name] is v or (not isinstance(v, fx.Node) and b[p.name] == v) else f"{p.name} differs"
            b[p.name] = v; return None
        if not isinstance(v, fx.Node) or v.op != "call_function" or v.target is not p.target: return f"expected {p.target}, found {v}"
        if not root and len(v.users) != 1: return f"{v.name} has {len(v.users)} users, a fused value must have one"
        orders = [v.args]
        if v.target in COMMUTATIVE: orders.append((v.args[1], v.args[0], *v.args[2:]))
        for o in orders:
            b2, n2 = dict(b), list(nodes)
            why = _m(tuple(p.args), tuple(o), b2, n2, False) or _m(dict(p.kwargs), dict(v.kwargs), b2, n2, False)
            if why is None:
                b.clear(); b.update(b2); nodes[:] = [*n2, v]; return None
        return why
    if isinstance(p, (tuple, list)):
        if not isinstance(v, (tuple, list)) or len(p) != len(v): return "arity"
        for x, y in zip(p, v):
            if (w := _m(x, y, b, nodes, False)): return w
        return None
    if isinstance(p, dict):
        if p.keys() != v.keys(): return "kwargs"
        for k in p:
            if (w := _m(p[k], v[k], b, nodes, False)): return w
        return None
    return None if type(p) is type(v) and p == v else f"expected {p!r}, found {v!r}"

def apply(gm, rules, log=None):
    log = log or RuleLog(); edits = 0
    from qpass.graphs import set_value
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "call_function" or node._erased: continue
        for r in rules:
            if r.root.target is not node.target: continue
            b, nodes = {}, []
            why = _m(r.root, node, b, nodes, True)
            m = Match(r, node, nodes, b)
            if why is None and r._check:
                ps = inspect.signature(r._check).parameters
                kw = dict(b); 
                if "match" in ps: kw["match"] = m
                if not any(p.kind == p.VAR_KEYWORD for p in ps.values()): kw = {k: v for k, v in kw.items() if k in ps}
                why = r._check(**kw)
            if why: log.misses[(r.name, node.name)] = (why, 0); continue
            before = set(gm.graph.nodes)
            with gm.graph.inserting_before(node):
                tr = fx.proxy.GraphAppendingTracer(gm.graph)
                out = r.replacement(**{k: fx.Proxy(v, tr) if isinstance(v, fx.Node) else v for k, v in b.items()}).node
            for n in gm.graph.nodes:
                if n not in before:
                    n.args, n.kwargs = full_arity(n.target, n.args, n.kwargs)
                    n.meta = {k: node.meta[k] for k in ("nn_module_stack", "site", "decision") if k in node.meta}
                    for x in nodes:
                        if "site" in x.meta: n.meta.setdefault("site", x.meta["site"])
                    n.meta["rule"] = r.name
                    if n is out: n.meta["val"] = node.meta["val"]
                    else: set_value(gm, n)
            node.replace_all_uses_with(out)
            for x in [node, *reversed(nodes)]:
                if not x._erased and not x.users: gm.graph.erase_node(x)
            edits += 1; log.hits.append((r.name, out.name)); break
    return edits
