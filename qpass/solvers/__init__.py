"""How a weight is rounded: one solver a file, each `(weight, type, statistics) -> Packed`."""
