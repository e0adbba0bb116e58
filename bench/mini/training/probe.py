"""A quick look at how good a transformer is: held-out samples, few steps, exact scores."""

import numpy as np
import torch
from torch import Tensor

from ....runtime.schedule import SchedulerConfig, sigmas_for
from ...checkpoint_writer import Spec
from ..instructions import Sample
from ..score import EditScore, score_all
from .batches import Group, assemble, draw_group
from .editor import Editor, rope_for
from .latents import Latents
from .reader import contents, read_right
from .run import Run

STEPS = 8
_CHUNK = 256


class Probe:
    """Fixed samples of every group and what a model makes of them."""

    def __init__(self, spec: Spec, run: Run, latents: Latents, groups: tuple[Group, ...]) -> None:
        self.spec, self.run, self.latents = spec, run, latents
        rng = np.random.default_rng(3)
        # at least a few of each; blank texts have no one right answer
        counts = [max(8, round(run.probe_samples * group.share)) for group in groups]
        plain = [Group(g.contexts, g.share, dict.fromkeys(g.kinds, 1.0), 0.0) for g in groups]
        self.samples = [
            draw_group(rng, group, count, "held_out")
            for group, count in zip(plain, counts, strict=True)
        ]
        self.editor: Editor | None = None

    def scores(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Percent exact by group, and over the edits the PSNR of the untouched region in dB."""
        if self.editor is None:
            self.editor = Editor(self.spec).requires_grad_(False)
            self.editor.to(self.run.device, self.run.dtype)
        self.editor.load_state_dict(weights)
        found: dict[str, float] = {}
        for name, samples in zip(self._names(), self.samples, strict=True):
            scores, decided = self._edit(self.editor, samples)
            found[name] = round(100 * float(np.mean([s.exact for s in scores])), 1)
            found[f"{name}_garbled"] = round(100 * float(np.mean([s.garbled for s in scores])), 1)
            found[f"{name}_decided"] = round(100 * float(np.mean(decided)), 1)
            kept = [s.psnr_untouched for s in scores if s.psnr_untouched is not None]
            if kept:
                found[f"{name}_psnr"] = round(float(np.mean(kept)), 2)
        return found

    def _names(self) -> list[str]:
        return [("caption", "edit", "pair")[len(s[0].contexts)] for s in self.samples]

    def _edit(self, editor: Editor, samples: list[Sample]) -> tuple[list[EditScore], list[bool]]:
        """The scores, and whether what is to come out is read right from noise alone."""
        device = self.run.device
        pictures, decided = [], []
        for start in range(0, len(samples), _CHUNK):
            batch = assemble(self.run.folder / "tokenizers", samples[start : start + _CHUNK])
            batch = batch.to(device)
            tokens = self.latents.encode_scenes(*batch.codes)
            tokens = tokens.unflatten(0, batch.backgrounds.shape)
            _, pictured, count, _ = tokens.shape
            side = round(count**0.5)
            noise = torch.randn(tokens[:, 0].shape, generator=torch.Generator().manual_seed(start))
            rope = rope_for(editor, side, pictured - 1, batch.t5.shape[1]).to(device)
            given = (noise.to(device), tokens[:, 1:].flatten(1, 2), batch.clip, batch.t5)
            pictures += list(self.latents.decode(denoise(editor, *given, rope)).cpu().numpy())
            reading = first_reading(editor, *given, rope)[:, :count]
            wanted = contents(batch.things[:, 0], batch.backgrounds[:, 0], side)
            decided += read_right(reading, wanted).all(1).tolist()
        befores = [s.contexts[0] if s.contexts else None for s in samples]
        return score_all(befores, [s.target for s in samples], pictures), decided


@torch.no_grad()
def first_reading(
    editor: Editor, noise: Tensor, contexts: Tensor, clip: Tensor, t5: Tensor, rope: Tensor
) -> Tensor:
    """What the editor reads of the target, and of contexts, before the first step."""
    level, scale = noise.new_ones(len(noise)), noise.new_full((len(noise),), 2.5)
    reading: Tensor = editor(noise, contexts, clip, t5, level, scale, rope).reading
    return reading


@torch.no_grad()
def denoise(
    editor: Editor,
    noise: Tensor,
    contexts: Tensor,
    clip: Tensor,
    t5: Tensor,
    rope: Tensor,
    guidance: float = 2.5,
    steps: int = STEPS,
) -> Tensor:
    """The pipeline's Euler steps for a batch: noise ``[B, T, 64]`` to tokens of pictures."""
    sigmas = sigmas_for(SchedulerConfig(), noise.shape[1], steps)
    x = noise
    for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        level = x.new_full((len(x),), now)
        scale = x.new_full((len(x),), guidance)
        x = x + (then - now) * editor(x, contexts, clip, t5, level, scale, rope).velocity
    return x
