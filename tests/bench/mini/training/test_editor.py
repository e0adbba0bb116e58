"""The training forward computes what the pipeline computes, and learns."""

import numpy as np
import pytest
import torch

from fluxkontext.bench.mini.instructions import draw_sample
from fluxkontext.bench.mini.scenes import render
from fluxkontext.bench.mini.training.batches import Batch, assemble
from fluxkontext.bench.mini.training.editor import Editor, Prediction, attend, initialise, rope_for
from fluxkontext.bench.mini.training.flow_stage import weigh
from fluxkontext.bench.mini.training.latents import Latents
from fluxkontext.bench.mini.training.learner import Learner
from fluxkontext.bench.mini.training.probe import denoise
from fluxkontext.bench.mini.training.reader import contents, misread
from fluxkontext.kernels.attention import attention_ref
from fluxkontext.runtime import KontextPipeline

from .conftest import SPEC, Random

SIDE = 8
KIND_OF = ("caption", "recolour", "insert")


def batch_of(model: Random, contexts: int, count: int) -> tuple[Batch, list]:
    rng = np.random.default_rng(contexts)
    samples = [draw_sample(rng, KIND_OF[contexts]) for _ in range(count)]
    return assemble(model.folder, samples), samples


def tokens_of(model: Random, batch: Batch) -> torch.Tensor:
    """``[B, 1 + contexts, tokens, 64]``."""
    return Latents(model.vae).encode_scenes(*batch.codes).unflatten(0, batch.backgrounds.shape)


@pytest.mark.parametrize("contexts", [0, 1, 2])
def test_a_step_of_training_is_a_step_of_the_pipeline(random_model: Random, contexts: int) -> None:
    batch, samples = batch_of(random_model, contexts, 2)
    tokens = tokens_of(random_model, batch)
    noise = torch.randn(tokens[:, 0].shape, generator=torch.Generator().manual_seed(0))
    rope = rope_for(random_model.editor, SIDE, contexts, SPEC.text_length)
    expected = denoise(
        random_model.editor,
        noise,
        tokens[:, 1:].flatten(1, 2),
        batch.clip,
        batch.t5,
        rope,
        guidance=3.0,
        steps=2,
    )
    with KontextPipeline.from_pretrained(
        random_model.folder, backend="native", precision="fp32", device="cpu"
    ) as pipe:
        found = pipe(
            [[render(scene) for scene in s.contexts] for s in samples] if contexts else None,
            [s.text for s in samples],
            num_inference_steps=2,
            guidance_scale=3.0,
            latents=noise.numpy(),
            output_type="latent",
        ).images
    assert np.abs(expected.numpy() - noise.numpy()).max() > 0.1  # something happens
    np.testing.assert_allclose(np.stack(found), expected.numpy(), atol=2e-4)


def test_samples_of_a_batch_keep_their_own_noise_level(random_model: Random) -> None:
    batch, _ = batch_of(random_model, 0, 2)
    rng = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, SIDE**2, 64, generator=rng)
    nothing = noisy.new_empty(2, 0, 64)
    sigmas, guidance = torch.tensor([0.2, 0.9]), torch.tensor([1.0, 4.0])
    rope = rope_for(random_model.editor, SIDE, 0, SPEC.text_length)

    def run(part: slice) -> torch.Tensor:
        inputs = (noisy, nothing, batch.clip, batch.t5, sigmas, guidance)
        with torch.no_grad():
            found: Prediction = random_model.editor(*(x[part] for x in inputs), rope)
        return found.velocity

    together = run(slice(None))
    alone = torch.cat([run(slice(0, 1)), run(slice(1, 2))])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_one_edit_is_learnt_by_heart(random_model: Random) -> None:
    batch, _ = batch_of(random_model, 1, 1)
    tokens = tokens_of(random_model, batch)
    target, contexts = tokens[:, 0], tokens[:, 1:]
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.7])
    editor = Editor(SPEC)
    initialise(editor, torch.Generator().manual_seed(0))
    learner = Learner(editor)
    rope = rope_for(editor, SIDE, 1, SPEC.text_length)
    wanted = contents(*batch.codes, SIDE)[None]
    errors, unreads = [], []
    for _ in range(80):
        noisy = torch.lerp(target, noise, level)
        found = editor(
            noisy, contexts.flatten(1, 2), batch.clip, batch.t5, level, torch.tensor([2.5]), rope
        )
        error = (found.velocity - (noise - target)).square().mean(-1)
        unread = misread(found.reading, wanted.flatten(1, 2)).unflatten(1, wanted.shape[1:3])
        loss, _ = weigh(error, unread, target, contexts, 1.0)
        loss.backward()
        learner.step(3e-3)
        errors.append(error.mean().item())
        unreads.append(unread.mean().item())
    assert errors[-1] < 0.02 * errors[0]
    assert unreads[-1] < 0.02 * unreads[0]


def test_attention_as_matrix_products_is_attention() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, generator=rng) for n in (5, 9, 9))
    torch.testing.assert_close(attend(q, k, v), attention_ref(q, k, v))
