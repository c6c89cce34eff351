"""LIFT in plain torch, as its paper and its released code define it (arXiv 2506.00772).

The oracle of the tests: full SVD, the product held, boolean masks, nothing fast.
"""

import math

import torch
from torch import Tensor


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest scores, ties to the lower flat index."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(scores.shape)


def principal_mask(weight: Tensor, rank: int, k: int) -> Tensor:
    """Where the best approximation of rank `rank` is largest in magnitude."""
    left, singular_values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    approximation = (left[:, :rank] * singular_values[:rank]) @ right[:rank]
    return topk_mask(approximation.abs(), k)


class LiftReference:
    """Steps a list of matrices by their .grad; moments are kept dense, zero outside the mask."""

    def __init__(
        self, parameters, *, lr, betas, eps, weight_decay, rank, density, refresh_interval,
        eps_mode="uncorrected",
    ):  # fmt: skip
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.rank, self.density, self.refresh_interval = rank, density, refresh_interval
        self.eps_mode = eps_mode
        self.t = 0
        self.masks = [torch.zeros_like(p, dtype=torch.bool) for p in self.parameters]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self):
        self.t += 1
        if self.t == 1 or self.t % self.refresh_interval == 0:
            self._select()
        for parameter, mask, moments in zip(self.parameters, self.masks, self.moments, strict=True):
            self._step(parameter, mask, *moments)

    def _select(self):
        for i, parameter in enumerate(self.parameters):
            k = math.floor(self.density * parameter.numel())
            self.masks[i] = principal_mask(parameter, self.rank, k)
            for moment in self.moments[i]:
                moment.mul_(self.masks[i])

    def _step(self, parameter, mask, exp_avg, exp_avg_sq):
        beta1, beta2 = self.betas
        grad = parameter.grad[mask]
        weight = parameter[mask] * (1 - self.lr * self.weight_decay)
        m = beta1 * exp_avg[mask] + (1 - beta1) * grad
        v = beta2 * exp_avg_sq[mask] + (1 - beta2) * grad**2
        exp_avg[mask], exp_avg_sq[mask] = m, v
        correction1, correction2 = 1 - beta1**self.t, 1 - beta2**self.t
        if self.eps_mode == "corrected":
            update = (m / correction1) / ((v / correction2).sqrt() + self.eps)
        else:
            update = math.sqrt(correction2) / correction1 * m / (v.sqrt() + self.eps)
        parameter[mask] = weight - self.lr * update
