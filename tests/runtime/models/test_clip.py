"""The CLIP text encoder is transformers' ``CLIPTextModel``."""

import pytest
import torch
from torch import Tensor, nn

from fluxkontext.runtime.config import ClipConfig
from fluxkontext.runtime.models.clip import ClipText

from .. import peers
from ..traces import error

VOCAB = 640


def ours(theirs: nn.Module) -> ClipText:
    """Our module with the same weights, its shape read from their config."""
    model = ClipText(ClipConfig.from_json(theirs.config.to_dict())).eval()
    state = {k.removeprefix("text_model."): v for k, v in theirs.state_dict().items()}
    model.load_state_dict({k: v for k, v in state.items() if "position_ids" not in k})
    return model


def prompts(end: int) -> Tensor:
    """Start, words, the end token and padding with it; one prompt fills all places."""
    ids = torch.randint(2, end, (3, peers.CLIP_LENGTH), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((5, 40, peers.CLIP_LENGTH - 1)):
        ids[row, length:] = end
    return ids


@torch.no_grad()
@pytest.mark.parametrize("legacy", [True, False])
def test_pooled(legacy: bool) -> None:
    """Published configs name 2 as the end token, which means the highest id."""
    end = VOCAB - 1
    theirs = peers.clip(vocab_size=VOCAB, eos_token_id=2 if legacy else end)
    ids = prompts(end)
    wanted = theirs(ids).pooler_output
    found = ours(theirs)(ids)
    assert found.shape == (3, 128)
    assert error(found, wanted) < 1e-5
    assert error(wanted[0], wanted[1]) > 0.1


@torch.no_grad()
def test_pools_at_the_first_end_token() -> None:
    """What follows the end cannot matter, what precedes it does."""
    model = ours(peers.clip(vocab_size=VOCAB))
    ids = prompts(VOCAB - 1)[:1]
    after, before = ids.clone(), ids.clone()
    after[0, 6:] = 7
    before[0, 2] = (before[0, 2] + 1) % 600
    assert error(model(after), model(ids)) < 1e-6
    assert error(model(before), model(ids)) > 1e-2


@torch.no_grad()
def test_shorter_input() -> None:
    theirs = peers.clip(vocab_size=VOCAB)
    ids = prompts(VOCAB - 1)[:, :60]
    ids[:, -1] = VOCAB - 1
    assert error(ours(theirs)(ids), theirs(ids).pooler_output) < 1e-5


@torch.no_grad()
def test_bf16() -> None:
    """No further from fp32 than transformers is."""
    theirs = peers.clip(vocab_size=VOCAB)
    ids = prompts(VOCAB - 1)
    exact = theirs(ids).pooler_output
    model = ours(theirs).bfloat16()
    theirs = theirs.bfloat16()
    assert error(model(ids).float(), exact) < 1.5 * error(theirs(ids).pooler_output.float(), exact)
