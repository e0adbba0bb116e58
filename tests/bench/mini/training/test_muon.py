"""Muon: orthogonal updates, cut and joined without loss, equal to torch's where both apply."""

import pytest
import torch

from fluxkontext.bench.mini.training.muon import Muon, newton_schulz


@pytest.mark.parametrize("shape", [(5, 16, 16), (2, 8, 24), (1, 24, 8)])
def test_singular_values_become_alike(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(stack).float())
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(12, 12), (10, 8), (8, 10), (6, 5, 3, 3)])
def test_equals_torch_where_nothing_is_cut(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=rng)
    gradients = torch.randn(3, *shape, generator=rng)
    ours = start.clone().requires_grad_()
    theirs = start.flatten(1).clone().requires_grad_()
    optimisers = (
        Muon([ours], lr=0.1, weight_decay=0.01),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    )
    for gradient in gradients:
        ours.grad, theirs.grad = gradient, gradient.flatten(1)
        for optimiser in optimisers:
            optimiser.step()
    change = (theirs - start.flatten(1)).norm()
    assert (ours.flatten(1) - theirs).norm() < 0.02 * change  # theirs computes in bf16


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_a_fused_matrix_is_its_square_parts(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = torch.zeros(shape, requires_grad=True)
    whole.grad = gradient
    Muon([whole], lr=1.0).step()
    axis = 0 if shape[0] > shape[1] else 1
    for part, piece in zip(whole.split(8, axis), gradient.split(8, axis), strict=True):
        alone = torch.zeros(8, 8, requires_grad=True)
        alone.grad = piece.contiguous()
        Muon([alone], lr=1.0).step()
        torch.testing.assert_close(part, alone)
