"""Muon for matrices, AdamW for everything else. Reference training 4.

Matrices of one shape are stepped together as one [B, n, m] with n <= m, so that Newton-Schulz is a handful of batched
products for the whole model. Every expert's gate, up and down is a matrix of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fathom.errors import TrainError
from fathom.train.config import OptimConfig

UPDATE_RMS = 0.18
"""Muon's updates have the root mean square that AdamW's have in practice, so both share one learning rate."""

_FAST = (3.4445, -4.7750, 2.0315)
_SETTLE = (2.0, -1.5, 0.5)


def orthogonalise(
    a: Tensor, steps: tuple[int, int] = (8, 2), dtype: torch.dtype = torch.float32, tiny: float = 1e-20
) -> Tensor:
    """Newton-Schulz: move the singular values of each matrix of `a` [..., n, m] to 1, directions kept; float32.

    The fast coefficients come first and leave values around 1; the settling ones have a fixed point at 1.
    """
    x = a.float()
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for p, q, r in [_FAST] * steps[0] + [_SETTLE] * steps[1]:
        gram = x @ x.mT
        x = p * x + (q * gram + r * (gram @ gram)) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon takes every matrix but the token embedding, the head and the compressors' position biases."""
    return parameter.dim() >= 2 and not name.endswith(("embed.weight", "head.weight", ".ape"))


def _pieces(name: str, p: Tensor) -> list[Tensor]:
    """The logically independent matrices of a tensor, as views [B, n, m]: experts apart, gate apart from up."""
    if name.endswith("w13"):
        return [p[:, : p.shape[1] // 2], p[:, p.shape[1] // 2 :]]
    return [p if p.dim() == 3 else p.unsqueeze(0)]


def _wide(name: str, p: Tensor) -> list[Tensor]:
    """The pieces of a tensor, each lying so that n <= m."""
    return [v.mT if v.shape[-2] > v.shape[-1] else v for v in _pieces(name, p)]


class Optimizer:
    """Both optimizers over one model. `step` reads `.grad`; `state` and `load` carry everything between processes."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.config = config
        self._trained = {n: p for n, p in named if p.requires_grad}
        self._matrices = {n: p for n, p in self._trained.items() if is_matrix(n, p)}
        self._momentum = {n: torch.zeros_like(p) for n, p in self._matrices.items()}
        self._others = {n: p for n, p in self._trained.items() if n not in self._matrices}
        self._moments = {n: torch.zeros(2, *p.shape, device=p.device) for n, p in self._others.items()}
        self._counts = dict.fromkeys(self._others, 0)

    def clip(self) -> float:
        """Scale all gradients so that their common norm is at most `clip`; return the norm before."""
        present = [p for p in self._trained.values() if p.grad is not None]
        return float(nn.utils.clip_grad_norm_(present, self.config.clip))

    def zero(self) -> None:
        """Forget the gradients."""
        for p in self._trained.values():
            p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at learning rate `lr` of every parameter that has a gradient; the others stay."""
        self._muon(lr)
        self._adamw(lr)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, by parameter name."""
        return {"momentum": self._momentum, "moments": self._moments, "counts": self._counts}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for mine, saved in ((self._momentum, state["momentum"]), (self._moments, state["moments"])):
            if mine.keys() != saved.keys():
                raise TrainError("the checkpoint's optimizer belongs to another model; start a new run folder")
            for name, tensor in mine.items():
                tensor.copy_(saved[name])
        self._counts = dict(state["counts"])

    def _muon(self, lr: float) -> None:
        groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, p in self._matrices.items():
            if p.grad is not None:
                ahead = self._nesterov(self._momentum[name], p.grad)
                for w, u in zip(_wide(name, p.data), _wide(name, ahead), strict=True):
                    groups[tuple(w.shape[-2:])].append((w, u))
        for group in groups.values():
            self._move([w for w, _ in group], torch.cat([u for _, u in group]), lr)

    def _nesterov(self, momentum: Tensor, grad: Tensor) -> Tensor:
        momentum.mul_(self.config.momentum).add_(grad)
        return torch.add(grad, momentum, alpha=self.config.momentum)

    def _move(self, weights: list[Tensor], direction: Tensor, lr: float) -> None:
        c = self.config
        update = orthogonalise(direction, c.ns_steps, getattr(torch, c.ns_dtype))
        size = lr * UPDATE_RMS * update.shape[-1] ** 0.5
        for w, u in zip(weights, torch.split(update, [w.shape[0] for w in weights]), strict=True):
            w.mul_(1 - lr * c.weight_decay).sub_(u, alpha=size)

    def _adamw(self, lr: float) -> None:
        for name, p in self._others.items():
            if p.grad is not None:
                self._counts[name] += 1
                self._adam_one(p, p.grad, self._moments[name], self._counts[name], lr)

    def _adam_one(self, p: Tensor, grad: Tensor, moments: Tensor, count: int, lr: float) -> None:
        c, (one, two) = self.config, self.config.betas
        m, v = moments
        m.lerp_(grad, 1 - one)
        v.mul_(two).addcmul_(grad, grad, value=1 - two)
        if p.dim() > 1 or c.decay_vectors:
            p.mul_(1 - lr * c.weight_decay)
        p.addcdiv_(m, (v / (1 - two**count)).sqrt_().add_(c.eps), value=-lr / (1 - one**count))


def learning_rate(progress: float, step: int, peak: float, warmup: int, decay: float, floor: float) -> float:
    """Linear over `warmup` steps, constant, then over the last `decay` of `progress` 0..1 a cosine to floor * peak."""
    ramp = min(1.0, (step + 1) / max(warmup, 1))
    into = min(max((progress - (1 - decay)) / decay, 0.0), 1.0) if decay else 0.0
    cosine = 0.5 * (1 + math.cos(math.pi * into))
    return peak * ramp * (floor + (1 - floor) * cosine)
