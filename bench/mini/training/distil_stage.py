"""Stage four: make the guidance scale do something.

FLUX.1 [dev] was distilled from a model with classifier-free guidance, so that one pass with a scale
as input does what took two. Here the teacher is the model of stage three, and the scale is counted
from where it is trained: at 2.5 the student is the plain conditional model, below it the text
counts for less, above for more.
"""

import torch
from torch import Tensor

from ...checkpoint_writer import Spec
from .batches import Batch, token_ids
from .editor import Editor
from .flow_stage import PLAIN_GUIDANCE, FlowStage, disturb, draw_sigmas, weigh
from .latents import Latents
from .run import Run

LOWEST, HIGHEST = 1.0, 5.0
_PLAIN_SHARE = 0.5
"""Samples that go on with stage three at the plain scale, so that nothing is unlearnt."""


class DistilStage(FlowStage):
    """Learns the teacher's guided velocity as a function of the scale."""

    def __init__(self, spec: Spec, run: Run, latents: Latents, weights: dict[str, Tensor]) -> None:
        super().__init__("distill", spec, run, latents, weights)
        self.teacher = Editor(spec).requires_grad_(False)
        self.teacher.load_state_dict(weights)
        self.teacher.to(run.device, run.dtype)
        clip, t5 = token_ids(run.folder / "tokenizers", [""])
        self.blank = clip.to(run.device), t5.to(run.device)

    def loss(
        self, batch: Batch, tokens: Tensor, generator: torch.Generator, share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        target, contexts = tokens[:, 0], tokens[:, 1:]
        noise = torch.randn(target.shape, generator=generator, device=target.device)
        sigmas = draw_sigmas(len(target), generator)
        noisy = torch.lerp(target, noise, sigmas[:, None, None])
        given = disturb(contexts, generator).flatten(1, 2)
        rope = self.ropes[contexts.shape[1]]

        count = len(target) - max(1, round(_PLAIN_SHARE * len(target)))  # guided ones come first
        uniform = torch.rand(len(target), generator=generator, device=target.device)
        guidance = LOWEST * (HIGHEST / LOWEST) ** uniform
        guidance[count:] = PLAIN_GUIDANCE
        wanted = noise - target
        if count:
            wanted[:count] = self._guided(
                noisy[:count], given[:count], batch, sigmas[:count], guidance[:count], rope
            )
        found = self.module(noisy, given, batch.clip, batch.t5, sigmas, guidance, rope)
        error = (found.velocity - wanted).square().mean(-1)
        return weigh(error, self.unread(found, batch), target, contexts, share)

    @torch.no_grad()
    def _guided(
        self,
        noisy: Tensor,
        given: Tensor,
        batch: Batch,
        sigmas: Tensor,
        guidance: Tensor,
        rope: Tensor,
    ) -> Tensor:
        """The teacher's velocity without text, and from there towards that with it."""
        count = len(noisy)
        plain = torch.full_like(guidance, PLAIN_GUIDANCE)
        blank = [ids.expand(count, -1) for ids in self.blank]
        without = self.teacher(noisy, given, *blank, sigmas, plain, rope).velocity
        with_text = self.teacher(
            noisy, given, batch.clip[:count], batch.t5[:count], sigmas, plain, rope
        ).velocity
        return torch.lerp(without, with_text, (guidance / PLAIN_GUIDANCE)[:, None, None])
