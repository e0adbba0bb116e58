"""The networks of an edit as one module to train: both text encoders and the transformer.

They are the runtime's own; :meth:`Editor.forward` is one step of the pipeline for a batch in which
every sample has its own noise level.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....kernels import reference
from ....kernels.attention import attention_ref
from ....runtime.geometry import position_ids
from ....runtime.models.clip import ClipText
from ....runtime.models.t5 import T5Encoder
from ....runtime.models.transformer import Flux
from ...checkpoint_writer import Spec
from .reader import Reader

_SILENT = ("_mod.lin.", "modulation", "final_layer.linear.")
"""Parameters that start at zero: every block is then the identity, and the velocity nothing."""


class Prediction(NamedTuple):
    """velocity: ``[B, T, 64]``. reading: logits of what each token of the target and the contexts
    shows, ``[B, T + C * T, sum(CLASSES)]``. Both float32."""

    velocity: Tensor
    reading: Tensor


class Editor(nn.Module):
    """Parameters are named ``<component>.<canonical name>``; ``reader`` only serves training."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.text_encoder = ClipText(spec.text_encoder)
        self.text_encoder_2 = T5Encoder(spec.text_encoder_2)
        self.transformer = Flux(spec.transformer, replace(reference(), attention=attend))
        self.reader = Reader(spec.transformer.hidden_size)
        blocks = self.transformer.single_blocks
        blocks[len(blocks) // 2].register_forward_pre_hook(self._keep)
        self._halfway: Tensor  # [B, S + T + C * T, D]

    def _keep(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._halfway = inputs[0]

    def forward(
        self,
        noisy: Tensor,
        contexts: Tensor,
        clip: Tensor,
        t5: Tensor,
        sigmas: Tensor,
        guidance: Tensor,
        rope: Tensor,
    ) -> Prediction:
        """One step for a batch.

        noisy: ``[B, T, 64]``. contexts: ``[B, C * T, 64]``. clip, t5: token ids ``[B, tokens]``.
        sigmas, guidance: ``[B]`` float32. rope: of :func:`rope_for`.
        """
        flux = self.transformer
        dtype = flux.img_in.weight.dtype
        txt = flux.txt_in(self.text_encoder_2(t5))
        modulation = flux.modulation(sigmas[None], guidance, self.text_encoder(clip))[0]
        context = flux.img_in(contexts.to(dtype))
        velocity: Tensor = flux(noisy.to(dtype), context, txt, modulation, rope)
        reading = self.reader(self._halfway[:, txt.shape[1] :])
        return Prediction(velocity.float(), reading.float())


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`attention_ref`, on CPUs as two matrix products: going back through these takes much
    less time than through torch's attention there."""
    if q.is_cuda:
        return attention_ref(q, k, v)
    batch, dim = q.shape[0], q.shape[-1]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=dim**-0.5)
    heads: Tensor = torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, -1))
    return heads.transpose(1, 2).flatten(2)


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
        block.forward = torch.compile(block.forward, dynamic=False)  # hooks stay outside
