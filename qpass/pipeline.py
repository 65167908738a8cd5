from __future__ import annotations
import os, time, copy
from dataclasses import dataclass, field
from typing import Any, Callable
import torch
from qpass.graph_text import text
from qpass.rewrite import RuleLog
@dataclass(frozen=True)
class Pass:
    name: str; needs: str; leaves: str; run: Callable; tolerance: float | None = None; changes_values: bool = False
@dataclass(frozen=True)
class Settings:
    check: str = "structure"; dump: str = ""; log: str = ""
    @staticmethod
    def from_env(): return Settings(os.environ.get("QPASS_CHECK","structure"), os.environ.get("QPASS_DUMP",""))
@dataclass
class Step: name: str; level: str; text: str; edits: int; seconds: float
@dataclass
class Context:
    graph_name: str; settings: Settings; plan: Any = None; backend: Any = None; names: Any = None
    steps: list = field(default_factory=list); log: RuleLog = field(default_factory=RuleLog); kept: list = field(default_factory=list)
def run_pipeline(gm, passes, context, inputs=None):
    for p in passes:
        t = time.time()
        before = gm(*inputs) if context.settings.check == "numeric" and inputs else None
        e = p.run(gm, context); gm.graph.lint(); gm.recompile()
        if before is not None:
            after = gm(*inputs)
            for a, b in zip(before, after):
                if isinstance(a, torch.Tensor): print(p.name, e, (a-b).abs().max().item(), a.abs().max().item())
        context.steps.append(Step(p.name, p.leaves, text(gm), e, time.time() - t))
    return gm
