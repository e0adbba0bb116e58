"""Compile a launch for a GPU that need not be there.

The signature is the one that Triton derives from the launch's own arguments, so what is compiled
is what would run: the same pointer alignments, the same integers folded into the code.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .chips import Chip
from .launch import Launch


def build_for(launch: Launch, chip: Chip, **options: Any) -> Any:
    """Triton's compiled kernel for ``launch`` on ``chip``; from its disk cache a second time.

    options: more of Triton's own, such as ``ptx_version``.
    """
    target = GPUTarget("cuda", chip.sm, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = binder(
        **launch.args, num_warps=launch.warps, num_stages=launch.stages, **options
    )
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, specialization, given
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)
