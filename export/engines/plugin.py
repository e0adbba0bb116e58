"""QK-norm + RoPE as a plugin of TensorRT: our Triton kernel in the place of the node's body.

Loaded by the compiler's process; imports nothing of ours. TensorRT launches the kernel with the
addresses of inputs, then 32-bit integers, then the addresses of outputs.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

NAME = "NormRope"
NAMESPACE = "fluxkontext"
EPSILON = 1e-6
"""What the kernel adds to the mean square."""


def register(library: Any, kernel: dict[str, Any]) -> None:
    """Have the parser take nodes ``fluxkontext::NormRope`` for this kernel.

    library: TensorRT's module. kernel: ``name``, ``ptx``, ``threads``, ``shared`` (bytes of a
    block), ``integers`` (its parameters between inputs and outputs, in order), ``tokens`` and
    ``heads_at_once`` (of a block), and what it was compiled for: ``heads``, ``dim``, ``dtype``.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    else:
        trt = library
        # It asks for the frontend, a package that only re-exports the bindings and is not needed.
        sys.modules.setdefault("tensorrt", library)
        trtp = import_module(f"{library.__name__}.plugin")
    dim = int(kernel["dim"])
    wide = getattr(trt.DataType, kernel["dtype"])

    # Their parameters' names and annotations are what TensorRT goes by, `outputs` and `tactic` too.
    @trtp.register(f"{NAMESPACE}::{NAME}")
    def describe(
        x: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        rope: trtp.TensorDesc,
        epsilon: float,
        heads: int,
    ) -> trtp.TensorDesc:
        """``x [B, S, H, d]``, ``scale [d]``, ``rope [S, d / 2, 2]`` float32 -> as ``x``."""
        return x.like()

    @trtp.aot_impl(f"{NAMESPACE}::{NAME}")
    def launch(
        x: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        rope: trtp.TensorDesc,
        epsilon: float,
        heads: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        batch, tokens = x.shape_expr[0], x.shape_expr[1]
        found = {
            "types": (x.dtype, scale.dtype, rope.dtype, outputs[0].dtype),
            "heads": (heads, x.shape_expr[2].constant_value()),
            "channels": x.shape_expr[3].constant_value(),
            "epsilon": abs(epsilon - EPSILON) < EPSILON / 1000,
        }
        wanted = {
            "types": (wide, wide, trt.DataType.FLOAT, wide),
            "heads": (kernel["heads"],) * 2,
            "channels": dim,
            "epsilon": True,
        }
        if found != wanted:
            raise ValueError(f"{NAME}: expected {wanted}, found {found}")
        row = heads * dim
        whole = tokens * row
        values = {
            "tokens": tokens,
            "text_tokens": 0,  # one norm for all of them
            "heads": heads,
            "x_batch": whole,
            "x_token": row,
            "x_part": row,
            "x_head": dim,
            "out_batch": whole,
            "out_token": row,
            "out_part": row,
            "out_head": dim,
            "scale_stream": dim,
            "scale_part": dim,
        }
        integers = trtp.SymIntExprs(len(kernel["integers"]))
        for place, name in enumerate(kernel["integers"]):
            integers[place] = trtp.SymInt32(values[name])
        params = trtp.KernelLaunchParams(
            grid_x=trtp.cdiv(tokens, kernel["tokens"]),
            grid_y=-(-heads // kernel["heads_at_once"]),
            grid_z=batch,
            block_x=kernel["threads"],
            shared_mem=kernel["shared"],
        )
        return kernel["name"], kernel["ptx"], params, integers
