"""The networks of an edit as one module to train: both text encoders and the transformer.

They are the runtime's own; :meth:`Editor.forward` is one step of the pipeline for a batch in which
every sample has its own noise level.
"""

import torch
from torch import Tensor, nn

from ....kernels import reference
from ....runtime.geometry import position_ids
from ....runtime.models.clip import ClipText
from ....runtime.models.t5 import T5Encoder
from ....runtime.models.transformer import Flux
from ...checkpoint_writer import Spec

_SILENT = ("_mod.lin.", "modulation", "final_layer.linear.")
"""Parameters that start at zero: every block is then the identity, and the velocity nothing."""


class Editor(nn.Module):
    """Parameters are named ``<component>.<canonical name>``."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.text_encoder = ClipText(spec.text_encoder)
        self.text_encoder_2 = T5Encoder(spec.text_encoder_2)
        self.transformer = Flux(spec.transformer, reference())

    def forward(
        self,
        noisy: Tensor,
        contexts: Tensor,
        clip: Tensor,
        t5: Tensor,
        sigmas: Tensor,
        guidance: Tensor,
        rope: Tensor,
    ) -> Tensor:
        """Velocity ``[B, T, 64]`` float32.

        noisy: ``[B, T, 64]``. contexts: ``[B, C * T, 64]``. clip, t5: token ids ``[B, tokens]``.
        sigmas, guidance: ``[B]`` float32. rope: of :func:`rope_for`.
        """
        flux = self.transformer
        dtype = flux.img_in.weight.dtype
        txt = flux.txt_in(self.text_encoder_2(t5))
        modulation = flux.modulation(sigmas[None], guidance, self.text_encoder(clip))[0]
        context = flux.img_in(contexts.to(dtype))
        velocity: Tensor = flux(noisy.to(dtype), context, txt, modulation, rope)
        return velocity.float()


def rope_for(editor: Editor, side: int, contexts: int, text_tokens: int) -> Tensor:
    """The rotation table of square pictures ``side`` tokens wide, contexts at frames 1, 2 ..."""
    size = (side, side)
    positions = torch.from_numpy(position_ids(size, [size] * contexts))
    return editor.transformer.rope(positions, text_tokens)


@torch.no_grad()
def initialise(editor: Editor, generator: torch.Generator) -> None:
    """Fresh weights: Xavier, identity blocks and zero output (DiT, arXiv:2212.09748)."""
    for name, parameter in editor.named_parameters():
        if any(part in name for part in _SILENT) or name.endswith("bias"):
            parameter.zero_()
        elif "embedding" in name or "shared" in name or "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=0.5, generator=generator)
        elif parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=generator)
    for block in editor.text_encoder_2.encoder.block:
        attention = block.get_submodule("layer.0.SelfAttention")
        attention.get_parameter("q.weight").mul_(0.3)  # T5 does not scale its attention


def compile_blocks(editor: Editor) -> None:
    """Compile the blocks, each kind once for every sequence length; names of parameters stay."""
    flux = editor.transformer
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.compile(dynamic=False)
