"""The shapes of the miniature, and why they are what they are."""

from ....runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from ...checkpoint_writer import Spec
from ..backdrops import CANVAS
from ..tokens import TEXT_LENGTH
from .tokenizer_files import CLIP_LENGTH, T5_TOKENS, clip_tokens

MAX_MODEL_BYTES = 19_500_000
"""Of the four networks in bf16: with tokenizers and configs, 20 MB ship."""

_HEAD = 64
_WIDTH = 3 * _HEAD

MINI = Spec(
    # 64 target tokens of 64 numbers, as many for each context, 32 of text. To copy what stays, a
    # token carries its noise and its context's latents side by side through the last block: 128
    # numbers, so 192 channels and not fewer. An instruction takes several hops (which thing, where,
    # what is there, what should be), and six attentions have them: four of single blocks, which
    # cost 15 D^2 against 36 D^2 of a double one. Four more took half as long again per sample.
    transformer=TransformerConfig(
        hidden_size=_WIDTH,
        num_heads=_WIDTH // _HEAD,
        depth=2,
        depth_single_blocks=4,
        context_in_dim=128,
        vec_in_dim=96,
        mlp_hidden=4 * _WIDTH,
        axes_dim=(16, 24, 24),
    ),
    # Work at full resolution dominates the cost and needs the fewest channels: 16 there. What a
    # picture holds is decided at 1/8, where 80 channels cost parameters and hardly any time.
    vae=VaeConfig(
        block_out_channels=(16, 32, 64, 80),
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=CANVAS,
        force_upcast=False,
    ),
    text_encoder=ClipConfig(
        vocab_size=len(clip_tokens()),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        eos_token_id=len(clip_tokens()) - 1,
    ),
    text_encoder_2=T5Config(
        vocab_size=len(T5_TOKENS),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
    ),
    text_length=TEXT_LENGTH,
)
