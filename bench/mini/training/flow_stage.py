"""Stages two and three: the rectified flow, first from text alone, then jointly with edits."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ...checkpoint_writer import Spec
from .batches import JOINT, TEXT_TO_IMAGE, Batch, EditSteps
from .editor import Editor, Prediction, compile_blocks, initialise, rope_for
from .latents import Latents
from .probe import Probe
from .reader import contents, misread
from .run import Run

PLAIN_GUIDANCE = 2.5
"""The guidance scale at which the model does what it was shown; other ones are distilled last."""

# Noise levels. Most lie where shapes come into being, between 0.4 and 0.85: begun from targets with
# that much noise, models in training failed most. What an edit is to be has to be decided while
# the picture is still noise: later it can be read off. So some are drawn from the high end, of
# which a logit-normal alone (SD3, arXiv:2403.03206) has little; the uniform part keeps the low end
# covered.
_LOGIT_MEAN, _LOGIT_DEVIATION, _UNIFORM = 0.75, 0.8, 0.15
_DECIDING, _LOWEST_DECIDING = 0.33, 0.85

_CHANGED_WEIGHT = 4.0
"""Loss of a token that the edit changes, against one that it only copies."""
_CAPTION_WEIGHT = 1.5
_CHANGE = 0.3
"""Mean difference of latents, in standard deviations, from which a token counts as changed."""

_READING_WEIGHT = 0.3
"""Of the cross-entropy of what the target shows, beside the squared error of the velocity."""
_CONTEXT_READING = 0.25
"""Contexts are read too, for less: to see what is there is the easier half."""

_CONTEXT_NOISE = 0.25
"""Largest deviation of the noise on every other sample's contexts. A context that is itself an
edit's outcome is slightly off; who has seen such ones does not pile up errors over many turns."""


class FlowStage:
    """Trains text encoders and transformer on some groups of samples."""

    def __init__(
        self,
        name: str,
        spec: Spec,
        run: Run,
        latents: Latents,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """weights: of the stage before, if any."""
        self.name, self.spec, self.run = name, spec, run
        self.stage = {"t2i": 1, "edit": 2, "distill": 3}[name]
        self.groups = TEXT_TO_IMAGE if name == "t2i" else JOINT
        self.module = Editor(spec)
        if weights is None:
            initialise(self.module, torch.Generator().manual_seed(run.seed))
        else:
            self.module.load_state_dict(weights)
        self.module.to(run.device, run.dtype)
        if run.compile:
            compile_blocks(self.module)
        self.side = spec.vae.sample_size // (2 * spec.vae.downscale)
        self.ropes = [
            rope_for(self.module, self.side, contexts, spec.text_length).to(run.device)
            for contexts in range(3)
        ]
        self._probe = Probe(spec, run, latents, self.groups)
        self.latents = deepcopy(latents)
        if run.compile:  # a step's pictures have one shape, a probe's many
            self.latents.vae.encoder.compile(dynamic=False)

    def steps(self) -> EditSteps:
        run = self.run
        seed = 10 * run.seed + self.stage
        return EditSteps(self.groups, run.local_draws, seed, run.folder / "tokenizers", run.process)

    def losses(self, item: list[Batch], step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        generator = self.run.generator(self.stage, step)
        total = sum(len(batch.clip) for batch in item)
        batches = [batch.to(self.run.device) for batch in item]
        pictures = [batch.backgrounds.numel() for batch in item]
        scenes = self.latents.encode_scenes(  # all at once: few, large and equal launches
            *(torch.cat(parts) for parts in zip(*(b.codes for b in batches), strict=True))
        )
        for batch, part in zip(batches, scenes.split(pictures), strict=True):
            tokens = part.unflatten(0, batch.backgrounds.shape)
            share = len(batch.clip) / total
            yield self.loss(
                batch.repeated(self.run.views),
                tokens.repeat_interleave(self.run.views, 0),
                generator,
                share,
            )

    def loss(
        self, batch: Batch, tokens: Tensor, generator: torch.Generator, share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rectified flow: predict ``noise - target`` on the straight line between the two.

        tokens: ``[B, 1 + contexts, T, 64]``, target first. share: of the step's samples.
        """
        target, contexts = tokens[:, 0], tokens[:, 1:]
        noise = torch.randn(target.shape, generator=generator, device=target.device)
        sigmas = draw_sigmas(len(target), generator)
        noisy = torch.lerp(target, noise, sigmas[:, None, None])
        given = disturb(contexts, generator).flatten(1, 2)
        guidance = torch.full_like(sigmas, PLAIN_GUIDANCE)
        rope = self.ropes[contexts.shape[1]]
        found = self.module(noisy, given, batch.clip, batch.t5, sigmas, guidance, rope)
        error = (found.velocity - (noise - target)).square().mean(-1)  # [B, T]
        return weigh(error, self.unread(found, batch), target, contexts, share)

    def unread(self, found: Prediction, batch: Batch) -> Tensor:
        """How badly each token's contents were read: ``[B, 1 + contexts, T]``, target first."""
        wanted = contents(*batch.codes, self.side).unflatten(0, batch.backgrounds.shape)
        unread = misread(found.reading, wanted.flatten(1, 2))
        return unread.view(wanted.shape[:3])

    def probe(self, weights: dict[str, Tensor]) -> dict[str, float]:
        return self._probe.scores(weights)

    def result(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        return {"probe": self.probe(weights)}


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels ``[count]`` in 0..1, 1 is noise alone."""
    device = generator.device
    normal = torch.randn(count, generator=generator, device=device)
    sigmas = torch.sigmoid(_LOGIT_MEAN + _LOGIT_DEVIATION * normal)
    even, choice = torch.rand((2, count), generator=generator, device=device)
    sigmas = torch.where(choice < _UNIFORM, even, sigmas)
    high = _LOWEST_DECIDING + (1 - _LOWEST_DECIDING) * even
    return torch.where(choice > 1 - _DECIDING, high, sigmas)


def disturb(contexts: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the samples with noise of a random strength on their contexts."""
    strength = torch.rand((2, len(contexts), 1, 1, 1), generator=generator, device=contexts.device)
    noise = torch.randn(contexts.shape, generator=generator, device=contexts.device)
    return contexts + noise * (_CONTEXT_NOISE * strength[0] * (strength[1] < 0.5))


def weigh(
    error: Tensor, unread: Tensor, target: Tensor, contexts: Tensor, share: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a group, and figures for the log.

    error: of the target's tokens ``[B, T]``. unread: of the tokens' contents ``[B, 1 + C, T]``.
    target ``[B, T, 64]`` and contexts ``[B, C, T, 64]``: latents. share: of the step's samples.
    """
    if not contexts.shape[1]:
        parts = error.mean(), unread.mean()
        loss = share * _CAPTION_WEIGHT * (parts[0] + _READING_WEIGHT * parts[1])
        return loss, {"caption": parts[0].detach(), "caption_unread": parts[1].detach()}
    difference = (target - contexts[:, 0]).abs().mean(-1)
    changed = (difference / _CHANGE).clamp(max=1)
    weight = 1 + (_CHANGED_WEIGHT - 1) * changed
    missing = (unread[:, 0] * weight).mean() + _CONTEXT_READING * unread[:, 1:].mean()
    loss = share * ((error * weight).mean() + _READING_WEIGHT * missing)
    name = "edit" if contexts.shape[1] == 1 else "pair"

    def mean(values: Tensor, where: Tensor) -> Tensor:
        return (values.detach() * where).sum() / where.sum().clamp(min=1)

    return loss, {
        f"{name}_changed": mean(error, changed),
        f"{name}_kept": mean(error, 1 - changed),
        f"{name}_unread": mean(unread[:, 0], changed),
        f"{name}_context_unread": unread[:, 1:].mean().detach(),
    }
