"""Before a model is built with a kernel, the kernel is run once and held to torch's reference.

The rule is the house's: an error of at most twice the reference's own against float64. What fails
it, or raises, is replaced by the next implementation with one warning; what was asked for by name
raises.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .attend import Stream
from .candidates import CANDIDATES, Candidate, Situation, assembled, usable
from .gelu import gelu_beside_ref, gelu_ref
from .group_norm import CONFIG
from .kernel_set import KernelSet, reference
from .linear_fp8 import Fp8Product
from .modulate import modulate_ref, residual_modulate_ref
from .norm_rope import rope_table
from .nvfp4 import NvFp4, pack
from .quantize import FP8_MAX, Rows, quantize_rows_ref

_log = logging.getLogger(__name__)

BATCH, TOKENS, HEADS, ROWS = 2, 37, 3, 96
"""Of the inputs: small, and ragged for every block size. ROWS: of a weight."""
LONGEST = 5
"""Widths that the longest product sums over: a single block's, of the stream and its MLP."""


class BrokenContextError(RuntimeError):
    """A kernel faulted so that this process can do nothing more on its device."""


def proven(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    width: int,
    named: Mapping[str, str] | None = None,
    candidates: Mapping[str, tuple[Candidate, ...]] = CANDIDATES,
    channels: tuple[int, ...] = (128,),
    layers: Collection[str] = (),
) -> KernelSet:
    """The best implementation of every op that passes; its ``name`` says which these are.

    head_dim, width, channels: the model's, which the inputs have. named: ops to have one
    implementation or none. layers: ops of the model's quantised layers; a warning names those that
    would run in float32, though nobody asked for it. Raises ValueError where what is named does not
    exist, cannot be used or fails, and where a kernel has left the device unusable.
    """
    situation, named = Situation(device, dtype, head_dim, channels), named or {}
    if unknown := named.keys() - candidates.keys():
        raise ValueError(f"no op is called {sorted(unknown)}; there are {sorted(candidates)}")
    chosen = {}
    for op in candidates:
        for candidate in usable(op, situation, named.get(op), candidates):
            try:
                fault = fault_of(op, candidate, situation, width)
            except BrokenContextError as error:
                raise ValueError(str(error)) from error
            if fault is None:
                chosen[op] = candidate
                break
            message = (
                f"{op}: expected {candidate.name}'s result within twice the error of torch's, "
                f"found {fault}"
            )
            if op in named:
                raise ValueError(message)
            _log.warning("%s; using the next implementation", message)
    return assembled(chosen, situation, set(layers) - named.keys())


def trials(
    device: torch.device, dtype: torch.dtype, head_dim: int, width: int
) -> dict[str, dict[str, str]]:
    """Op -> implementation -> ``passes``, or why it cannot be used or what is wrong with it."""
    situation = Situation(device, dtype, head_dim)
    return {
        op: {
            c.name: c.supports(situation) or fault_of(op, c, situation, width) or "passes"
            for c in candidates
        }
        for op, candidates in CANDIDATES.items()
    }


def fault_of(op: str, candidate: Candidate, situation: Situation, width: int) -> str | None:
    """What is wrong with ``candidate`` on inputs of ``width`` channels; None if nothing is.

    Raises BrokenContextError where nothing else can be run after it.
    """
    if candidate.run is (candidate.plain or getattr(reference(), op)):
        return None
    for make in (CASES[op].make, *CASES[op].also):
        draw = torch.Generator().manual_seed(0)
        args = [_each(arg, situation.device) for arg in make(draw, situation, width)]
        if fault := _fault(op, candidate, args, situation.device):
            return fault
    return None


def _fault(op: str, candidate: Candidate, args: Sequence[Any], device: torch.device) -> str | None:
    reference_op: Callable[..., Any] = getattr(reference(), op)
    case = CASES[op]
    try:
        found = case.seen(candidate.run(*args))
        _settle(device)
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        try:
            _settle(device)
        except Exception:
            safe = next(c.name for c in CANDIDATES[op] if c.run is reference_op)
            raise BrokenContextError(
                f"{op}: {candidate.name} broke the CUDA context ({reason}); start again with "
                f"kernels={{'{op}': '{safe}'}}"
            ) from error
        return reason
    expected = case.seen((candidate.plain or reference_op)(*args))
    exact = (case.exact or reference_op)(*(_each(arg, torch.float64) for arg in args))
    faults = map(broken_rule, _several(found), _several(expected), _several(exact))
    return next((fault for fault in faults if fault), None)


def _settle(device: torch.device) -> None:
    """Wait for what is queued: a kernel's fault is raised by whatever waits next."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def broken_rule(result: Tensor, expected: Tensor, exact: Tensor) -> str | None:
    """How ``result`` breaks the house rule; None if it keeps it.

    expected, exact: what the reference gives for the same inputs, and in float64. Both the largest
    and the root mean square error count.
    """
    if (result.dtype, result.shape) != (expected.dtype, expected.shape):
        return f"{result.dtype} {list(result.shape)}, not {expected.dtype} {list(expected.shape)}"
    ours, theirs = result.double() - exact, expected.double() - exact
    if not torch.isfinite(ours).all():
        return "a number that is not finite"
    for name, measure in (("largest", _largest), ("rms", _rms)):
        error, limit = measure(ours), 2 * measure(theirs)
        if error > limit:
            return f"{name} error {error:.3e}, allowed {limit:.3e}"
    return None


def _largest(error: Tensor) -> float:
    return error.abs().amax().item()


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def _several(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _each(arg: Any, target: torch.device | torch.dtype) -> Any:
    """An argument on a device, or with all but quantised numbers in a floating-point type."""
    if isinstance(arg, tuple):
        parts = [_each(part, target) for part in arg]
        return type(arg)(*parts) if hasattr(arg, "_fields") else tuple(parts)
    if not isinstance(arg, (NvFp4, Tensor)):
        return arg
    if isinstance(arg, NvFp4):
        return NvFp4(*(_each(getattr(arg, field.name), target) for field in fields(arg)))
    plain = arg.is_floating_point() and arg.itemsize > 1
    return arg.to(target) if plain or isinstance(target, torch.device) else arg


def _same(results: Any) -> Any:
    return results


def _dequantised(rows: Rows) -> Tensor:
    return rows.values.float() * rows.scale


Make = Callable[[torch.Generator, Situation, int], list[Any]]


@dataclass(frozen=True)
class Case:
    """Arguments for an op. seen: what of its results is compared. exact: in place of the op's
    reference in float64, where that would quantise. also: other arguments, tried after these."""

    make: Make
    seen: Callable[[Any], Any] = _same
    exact: Callable[..., Any] | None = None
    also: tuple[Make, ...] = ()


def _modulate(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    return [_randn(draw, at, BATCH, TOKENS, width), *_vectors(draw, at, 2, width)]


def _gate_residual(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    x, y = (_randn(draw, at, BATCH, TOKENS, width) for _ in range(2))
    return [x, *_vectors(draw, at, 1, width), y]


def _residual_modulate(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    return [*_gate_residual(draw, at, width), *_vectors(draw, at, 2, width)]


def _norm_rope(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    x = _randn(draw, at, BATCH, TOKENS, 3 * HEADS * at.head_dim)
    positions = torch.randint(0, 64, (TOKENS, 1), generator=draw)
    rope = rope_table(positions, (at.head_dim,), 10_000.0)
    scale = 1 + 0.2 * _randn(draw, at, at.head_dim)
    return [x.unflatten(-1, (3, HEADS, at.head_dim))[:, :, 1], scale, rope]


def _attention(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    qkv = _randn(draw, at, BATCH, 4 * TOKENS, 3 * HEADS * at.head_dim)
    q, k, v = qkv.unflatten(-1, (3, HEADS, at.head_dim)).unbind(2)
    return [q[:, TOKENS:], k, v]


def _attend(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    text, image = (_stream(draw, at, tokens) for tokens in (TOKENS, 4 * TOKENS))
    rope = _rope(at, 5 * TOKENS)
    return [reference(), (text, image), rope, rope]


def _attend_some(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    """One stream, of which the last tokens alone ask, as in the last block."""
    stream, rope = _stream(draw, at, 5 * TOKENS), _rope(at, 5 * TOKENS)
    return [reference(), (stream._replace(q=stream.q[:, TOKENS:]),), rope[TOKENS:], rope]


def _stream(draw: torch.Generator, at: Situation, tokens: int) -> Stream:
    qkv = _randn(draw, at, BATCH, tokens, 3 * HEADS * at.head_dim)
    norms = 1 + 0.2 * _randn(draw, at, 2, at.head_dim)
    q, k, v = qkv.unflatten(-1, (3, HEADS, at.head_dim)).unbind(2)
    return Stream(q, k, v, *norms.unbind(0))


def _rope(at: Situation, tokens: int) -> Tensor:
    return rope_table(torch.arange(tokens)[:, None], (at.head_dim,), 10_000.0)


def _gelu(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    return [_randn(draw, at, BATCH, TOKENS, 5 * width)[..., width:]]


def _gelu_beside(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    return [_randn(draw, at, BATCH, TOKENS, width), *_gelu(draw, at, width)]


def _group_norm(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    """A picture that several programs share, whose moments are merged."""
    channels = at.channels[-1]
    groups = math.gcd(channels, 32) // 2 or 1
    height = 3 * CONFIG.elements * groups // (11 * channels) + 1
    x = _randn(draw, at, BATCH, channels, height, 11)
    weight, bias = _randn(draw, at, channels), _randn(draw, at, channels)
    return [x, groups, weight, bias, 1e-6]


def _quantize_rows(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    return [_randn(draw, at, BATCH, TOKENS, width)]


def _quantize_tensor(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    x = _randn(draw, at, BATCH, TOKENS, width)
    return [x, x.abs().amax().float() / FP8_MAX]


def _linear_fp8(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    products, width = [], LONGEST * width
    for tokens in (TOKENS, TOKENS // 2):
        x, x_scale = quantize_rows_ref(_randn(draw, at, BATCH, tokens, width))
        weight, w_scale = quantize_rows_ref(_randn(draw, at, ROWS, width) / width**0.5)
        bias = _randn(draw, at, ROWS)
        products.append(Fp8Product(x, x_scale, weight, w_scale.squeeze(-1), bias))
    return [tuple(products)]


def _linear_w4a16(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    width *= LONGEST
    weight = pack(_randn(draw, at, ROWS, width) / width**0.5)
    return [_randn(draw, at, TOKENS, width), weight, _randn(draw, at, ROWS)]


def _linear_w4a4(draw: torch.Generator, at: Situation, width: int) -> list[Any]:
    x, weight, bias = _linear_w4a16(draw, at, width)
    return [x, pack(x).scale, weight, bias]


def _randn(draw: torch.Generator, at: Situation, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw).to(at.dtype)


def _vectors(draw: torch.Generator, at: Situation, count: int, width: int) -> list[Tensor]:
    return list(_randn(draw, at, count, BATCH, 1, width).unbind(0))


CASES: Mapping[str, Case] = {
    "modulate": Case(_modulate),
    "residual_modulate": Case(_residual_modulate),
    "norm_rope": Case(_norm_rope),
    "attention": Case(_attention),
    "attend": Case(_attend, also=(_attend_some,)),
    "gate_residual": Case(_gate_residual),
    "gelu": Case(_gelu),
    "gelu_beside": Case(_gelu_beside),
    "modulate_rows": Case(_modulate, seen=_dequantised, exact=modulate_ref),
    "residual_modulate_rows": Case(
        _residual_modulate,
        seen=lambda results: (results[0], _dequantised(results[1])),
        exact=residual_modulate_ref,
    ),
    "gelu_rows": Case(_gelu, seen=_dequantised, exact=gelu_ref),
    "gelu_beside_rows": Case(_gelu_beside, seen=_dequantised, exact=gelu_beside_ref),
    "group_norm_silu": Case(_group_norm),
    "quantize_rows": Case(_quantize_rows, seen=_dequantised, exact=_same),
    "quantize_tensor": Case(_quantize_tensor, seen=_dequantised, exact=lambda x, _scale: x),
    "linear_fp8": Case(_linear_fp8),
    "linear_w4a16": Case(_linear_w4a16),
    "linear_w4a4": Case(_linear_w4a4),
}
"""What every op is tried on."""
