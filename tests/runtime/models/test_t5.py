"""The T5 encoder is transformers' ``T5EncoderModel``, as diffusers calls it: without a mask."""

import pytest
import torch
from torch import Tensor, nn

from fluxkontext.runtime.config import T5Config
from fluxkontext.runtime.models.t5 import T5Encoder

from .. import peers
from ..traces import error

VOCAB = 256


def ours(theirs: nn.Module) -> T5Encoder:
    """Our module with the same weights, its shape read from their config."""
    model = T5Encoder(T5Config.from_json(theirs.config.to_dict())).eval()
    state = theirs.state_dict()
    assert torch.equal(state.pop("encoder.embed_tokens.weight"), state["shared.weight"])
    model.load_state_dict(state)
    return model


def prompts(tokens: int) -> Tensor:
    """Words, the end token (1) and padding (0)."""
    ids = torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(0))
    ids[0, tokens // 2] = 1
    ids[0, tokens // 2 + 1 :] = 0
    return ids


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 64, 130, 300])
def test_tokens(tokens: int) -> None:
    """Also far beyond the distance (128) from which on all share one bucket."""
    theirs = peers.t5(vocab_size=VOCAB)
    ids = prompts(tokens)
    wanted = theirs(ids).last_hidden_state
    assert error(ours(theirs)(ids), wanted) < 1e-5


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64), (64, 500)])
def test_buckets(buckets: int, distance: int) -> None:
    """Every distance falls into the bucket of transformers, bit for bit."""
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        vocab_size=8,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
    )
    tokens = 700
    at = torch.arange(tokens)
    wanted = T5Attention._relative_position_bucket(
        at[None, :] - at[:, None],
        bidirectional=True,
        num_buckets=buckets,
        max_distance=distance,
    )
    found = T5Encoder(config).encoder._buckets(tokens, torch.device("cpu"))
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_padding_attends() -> None:
    """FLUX was trained so: the length of the padding changes the words' embeddings."""
    model = ours(peers.t5(vocab_size=VOCAB))
    ids = prompts(32)[:1]
    longer = torch.cat([ids, torch.zeros(1, 8, dtype=ids.dtype)], dim=1)
    assert error(model(longer)[:, :10], model(ids)[:, :10]) > 1e-3


@torch.no_grad()
def test_bf16() -> None:
    """No further from fp32 than transformers is."""
    theirs = peers.t5(vocab_size=VOCAB)
    ids = prompts(64)
    exact = theirs(ids).last_hidden_state
    model = ours(theirs).bfloat16()
    theirs = theirs.bfloat16()
    peers_error = error(theirs(ids).last_hidden_state.float(), exact)
    assert error(model(ids).float(), exact) < 1.5 * peers_error


@torch.no_grad()
def test_fp16_stays_finite() -> None:
    """Where the feed-forward leaves fp16's range, its last matrix in fp32 and a clamp save it."""
    theirs = peers.t5(vocab_size=VOCAB)
    for name, parameter in theirs.named_parameters():
        if name.endswith("wo.weight"):
            parameter.data.mul_(3e4)
    ids = prompts(64)
    model = ours(theirs).half()
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    found = model(ids)
    assert found.dtype == torch.float16
    assert found.isfinite().all()
