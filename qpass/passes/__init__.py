"""The passes, one file each, and the order they run in."""

from __future__ import annotations

from qpass.passes.annotate import annotate
from qpass.passes.fold_norm import fold_norm
from qpass.passes.fuse import fuse
from qpass.passes.hoist import hoist
from qpass.passes.insert_qdq import insert_qdq
from qpass.passes.layout import layout
from qpass.passes.lower import lower
from qpass.passes.merge_siblings import merge_siblings
from qpass.passes.migrate import migrate
from qpass.passes.simplify import simplify
from qpass.pipeline import Pass

ORDER = (
    Pass("simplify", "float", "float", simplify),
    Pass("annotate", "float", "annotated", annotate),
    Pass("migrate", "annotated", "annotated", migrate, tolerance=1e-4),
    Pass("insert-qdq", "annotated", "qdq", insert_qdq, tolerance=None),
    Pass("fold-norm", "qdq", "qdq", fold_norm, tolerance=1e-4),
    Pass("hoist", "qdq", "qdq", hoist, tolerance=1e-6),
    Pass("fuse", "qdq", "fused", fuse, tolerance=2e-2),
    Pass("merge-siblings", "fused", "fused", merge_siblings, tolerance=4e-3),
    Pass("lower", "fused", "lowered", lower, tolerance=2e-2),
    Pass("layout", "lowered", "lowered", layout),
)
