"""A byte-level GPT of 3.4 M parameters, trained on the standard library's source in a few minutes, kept in the user's cache.

Files are taken in the order of their paths, every tenth is held out. The weights are found again by a hash of this file, of
torch's and Python's versions and the seed; they are written whole or not at all, and what cannot be read is trained again.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qpass.backends.native.build import cache_folder
from qpass.files import replacing

LAYERS, WIDTH, HEADS, LENGTH, BYTES = 4, 256, 4, 256, 256
STEPS, BATCH, RATE, DECAY, WARM = 900, 32, 2e-3, 0.1, 50
HELD_OUT = 10  # every so many files
BITS = math.log(2)


def source() -> tuple[Tensor, Tensor]:
    """(bytes to train on, bytes to score), uint8: the standard library without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not {"test", "tests", "site-packages", "idlelib"} & {*p.parts})
    parts: list[list[bytes]] = [[], []]
    for i, path in enumerate(files):
        parts[i % HELD_OUT == HELD_OUT - 1].append(path.read_bytes())
    train, score = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train, score


def sequences(data: Tensor, count: int, seed: int) -> Tensor:
    """[count, LENGTH + 1] bytes as int64, from places drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(len(data) - LENGTH - 1, (count,), generator=generator)
    return torch.stack([data[i : i + LENGTH + 1] for i in at.tolist()]).long()


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = self.qkv(self.norm_a(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm_b(x))))


class ByteGpt(nn.Module):
    """Bytes [B, L] -> logits [B, L, 256] of the byte behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log likelihood of a byte, in nats, of sequences [B, L + 1]."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _train(seed: int) -> ByteGpt:
    torch.manual_seed(seed)
    model, (data, _) = ByteGpt(), source()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    rate = lambda i: min((i + 1) / WARM, 0.5 * (1 + math.cos(math.pi * i / STEPS)) + 0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.perf_counter()
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(model, sequences(data, BATCH, 10_000 * (seed + 1) + step))
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            bits, spent = float(found.detach()) / BITS, time.perf_counter() - start
            print(f"step {step + 1} of {STEPS}: {bits:.3f} bits a byte, {spent:.0f} s", file=sys.stderr, flush=True)
    return model


def trained(seed: int = 0) -> ByteGpt:
    """The model, in eval mode; trained the first time."""
    key = "\n".join((Path(__file__).read_text(), torch.__version__, sys.version, str(seed)))
    path = cache_folder() / "nets" / f"byte-gpt-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    model = ByteGpt()
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        model = _train(seed)
        with contextlib.suppress(OSError):  # a full disk costs the next run the training
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                save_file({name: value.detach() for name, value in model.state_dict().items()}, part)
    return model.eval().requires_grad_(False)
