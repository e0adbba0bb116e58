"""Tiny random checkpoints, made and saved by diffusers' and transformers' own classes.

Nothing of the package under test is used here: the published layout, and the names of BFL's and
ComfyUI's single files, are written down a second time so that reading them is a real check.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TEXT_LENGTH = 64
CLIP_LENGTH = 77
Tensors = dict[str, Tensor]

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = "make the circle blue a red square move to left of it's don't remove background 12 néon"


def randomise(module: nn.Module, seed: int, gain: Callable[[str], float] = lambda _: 1.0) -> None:
    """Redraw every parameter so that each matters: no zero bias, no unit scale, outputs O(1)."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=rng)
        if parameter.ndim == 1:
            values = values * 0.2 + (0.0 if name.endswith("bias") else 1.0)
        elif "embedding" not in name and "shared" not in name and "embed_tokens" not in name:
            values = values / parameter[0].numel() ** 0.5
        parameter.data.copy_(values * gain(name))


def transformer(seed: int = 1, heads: int = 2, layers: int = 2, guidance: bool = True) -> nn.Module:
    """The DiT with the real head size and RoPE axes. Queries and keys are small before their norm,
    so that its epsilon matters."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=128,
        num_attention_heads=heads,
        joint_attention_dim=48,
        pooled_projection_dim=128,
        guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56),
    )
    small = ("to_q", "to_k", "add_q_proj", "add_k_proj")
    sharp = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")

    def gain(name: str) -> float:
        module = name.rsplit(".", 2)[-2]
        return 0.03 if module in small else 1.5 if module in sharp else 1.0

    randomise(model, seed, gain)
    # like a trained model's, the embedding is smooth in time: in bf16 diffusers rounds 1000 sigma
    # to multiples of 4, which high frequencies would turn into another time altogether
    frequencies = torch.exp(-torch.arange(128) / 128 * math.log(10_000)).repeat(2)
    for part in ("timestep_embedder", "guidance_embedder")[: 2 if guidance else 1]:
        weight = model.get_submodule(f"time_text_embed.{part}.linear_1").weight
        weight.data.mul_((0.02 / frequencies).clamp(max=1.0))
    return model.eval()


def vae(seed: int = 2, widths: tuple[int, ...] = (32, 32, 64, 64), **config: object) -> nn.Module:
    """The autoencoder, with FLUX's latent constants."""
    from diffusers import AutoencoderKL

    levels = len(widths)
    given = {"layers_per_block": 1, "norm_num_groups": 32, "sample_size": 128, **config}
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **given,
    )
    randomise(model, seed, lambda name: 0.5 if name.startswith("decoder.conv_out") else 1.0)
    return model.eval()


def clip(seed: int = 3, vocab_size: int = 640, eos_token_id: int = 2) -> nn.Module:
    """CLIP's text model; two heads of 64 channels."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="quick_gelu",
        projection_dim=128,
        bos_token_id=0,
        eos_token_id=eos_token_id,
        pad_token_id=1,
    )
    model = CLIPTextModel(config)
    randomise(model, seed)
    return model.eval()


def t5(seed: int = 4, vocab_size: int = 256) -> nn.Module:
    """T5-v1.1's encoder; its heads together are wider than the model, and unscaled."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab_size,
        d_model=48,
        d_kv=16,
        d_ff=80,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = T5EncoderModel(config)
    randomise(model, seed, lambda name: 0.25 if name.endswith("SelfAttention.q.weight") else 1.0)
    return model.eval()


def write_clip_tokenizer(folder: Path) -> int:
    """Byte-level BPE with some merges, as ``vocab.json`` and ``merges.txt``; returns its size."""
    from tokenizers.pre_tokenizers import ByteLevel

    bytes_ = sorted(ByteLevel.alphabet())
    vocab = [*bytes_, *(f"{symbol}</w>" for symbol in bytes_)]
    merges: list[str] = []
    for word in WORDS.split():
        spelled = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]
        parts = [*spelled[:-1], f"{spelled[-1]}</w>"]
        while len(parts) > 1:
            if (pair := f"{parts[0]} {parts[1]}") not in merges:
                merges.append(pair)
            parts[:2] = ["".join(parts[:2])]
            if parts[0] not in vocab:
                vocab.append(parts[0])
    vocab += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(vocab)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    added = {  # as published: the one is looked for after lower-casing, the other before
        str(ids[token]): {"content": token, "normalized": token == START, "special": True}
        for token in (START, END)
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH}
    settings |= {"added_tokens_decoder": added, "bos_token": START, "do_lower_case": True}
    settings |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), END)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(vocab)


def write_t5_tokenizer(folder: Path) -> int:
    """Unigram pieces with scores, saved by transformers' own class; returns its size."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -4.0 - i / 8) for i, word in enumerate(WORDS.split())]
    pieces += [(half, -5.0) for half in ("cir", "cle", "ing", "▁re", "move")]
    pieces += [(chr(code), -6.0 - code / 100) for code in (*range(33, 127), 0xE9, 0x4E2D)]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    tokenizer = T5TokenizerFast(vocab=pieces, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return len(pieces)


def write_hub_folder(
    folder: Path,
    transformer: nn.Module,
    vae: nn.Module,
    *,
    clip_prefix: str = "text_model.",
) -> None:
    """Write a whole model as the published repository lays it out."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder.mkdir(parents=True)
    clip_size = write_clip_tokenizer(folder / "tokenizer")
    t5_size = write_t5_tokenizer(folder / "tokenizer_2")
    pipeline = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vae,
        text_encoder=clip(vocab_size=clip_size),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=t5(vocab_size=t5_size),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    # sharded, as published
    for name, size in (("transformer", "1MB"), ("text_encoder_2", "100KB")):
        shutil.rmtree(folder / name)
        getattr(pipeline, name).save_pretrained(folder / name, max_shard_size=size)
        assert len(list((folder / name).glob("*-of-*.safetensors"))) > 1, name
        assert list((folder / name).glob("*.safetensors.index.json")), name
    # transformers 5 writes CLIP's tokenizer as tokenizer.json and its weights without their prefix
    shutil.rmtree(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer")
    file = folder / "text_encoder" / "model.safetensors"
    bare = {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
    save_file({clip_prefix + name: v for name, v in bare.items()}, file, {"format": "pt"})


def _moved(source: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensors:
    """Weight and, where there is one, bias of modules under their new names."""
    return {
        f"{new}.{kind}": source[f"{old}.{kind}"]
        for old, new in names.items()
        for kind in ("weight", "bias")
        if f"{old}.{kind}" in source
    }


def _stacked(source: Mapping[str, Tensor], names: Iterable[str], new: str) -> Tensors:
    return {
        f"{new}.{kind}": torch.cat([source[f"{old}.{kind}"] for old in names])
        for kind in ("weight", "bias")
    }


def bfl_transformer(source: Mapping[str, Tensor]) -> Tensors:
    """BFL's tensors from those of ``FluxTransformer2DModel``."""
    out = _moved(source, {"x_embedder": "img_in", "context_embedder": "txt_in"})
    out |= _moved(source, {"proj_out": "final_layer.linear"})
    for bfl, ours in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text")):
        for side, number in (("in", 1), ("out", 2)):
            old = f"time_text_embed.{ours}_embedder.linear_{number}"
            out |= _moved(source, {old: f"{bfl}_in.{side}_layer"})
    for kind in ("weight", "bias"):
        scale, shift = source[f"norm_out.linear.{kind}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for i in range(_count(source, "transformer_blocks.")):
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, mod, qkv, norm, out_proj, ff in (
            ("img", "norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
            ("txt", "norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        ):
            modules = [f"{old}.attn.{qkv.format(letter)}" for letter in "qkv"]
            out |= _stacked(source, modules, f"{new}.{stream}_attn.qkv")
            moves = {
                f"{old}.{mod}.linear": f"{new}.{stream}_mod.lin",
                f"{old}.attn.{out_proj}": f"{new}.{stream}_attn.proj",
                f"{old}.{ff}.net.0.proj": f"{new}.{stream}_mlp.0",
                f"{old}.{ff}.net.2": f"{new}.{stream}_mlp.2",
            }
            out |= _moved(source, moves)
            for letter, word in (("q", "query"), ("k", "key")):
                scale = source[f"{old}.attn.{norm.format(letter)}.weight"]
                out[f"{new}.{stream}_attn.norm.{word}_norm.scale"] = scale
    for i in range(_count(source, "single_transformer_blocks.")):
        old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        parts = [*(f"{old}.attn.to_{letter}" for letter in "qkv"), f"{old}.proj_mlp"]
        out |= _stacked(source, parts, f"{new}.linear1")
        moves = {f"{old}.proj_out": f"{new}.linear2", f"{old}.norm.linear": f"{new}.modulation.lin"}
        out |= _moved(source, moves)
        for letter, word in (("q", "query"), ("k", "key")):
            out[f"{new}.norm.{word}_norm.scale"] = source[f"{old}.attn.norm_{letter}.weight"]
    return out


def bfl_vae(source: Mapping[str, Tensor]) -> Tensors:
    """BFL's tensors from those of ``AutoencoderKL``."""
    out: Tensors = {}
    for part, there, here in (("encoder", "down", "down"), ("decoder", "up", "up")):
        levels = _count(source, f"{part}.{there}_blocks.")
        out |= _moved(source, {f"{part}.conv_{x}": f"{part}.conv_{x}" for x in ("in", "out")})
        out |= _moved(source, {f"{part}.conv_norm_out": f"{part}.norm_out"})
        blocks = {f"{part}.mid_block.resnets.{i}": f"{part}.mid.block_{i + 1}" for i in (0, 1)}
        for i in range(levels):
            old = f"{part}.{there}_blocks.{i}"
            new = f"{part}.{here}.{i if part == 'encoder' else levels - 1 - i}"
            for j in range(_count(source, f"{old}.resnets.")):
                blocks[f"{old}.resnets.{j}"] = f"{new}.block.{j}"
            out |= _moved(source, {f"{old}.{there}samplers.0.conv": f"{new}.{there}sample.conv"})
        for old, new in blocks.items():
            names = {f"{old}.{x}{n}": f"{new}.{x}{n}" for x in ("norm", "conv") for n in (1, 2)}
            out |= _moved(source, {**names, f"{old}.conv_shortcut": f"{new}.nin_shortcut"})
        old, new = f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1"
        out |= _moved(source, {f"{old}.group_norm": f"{new}.norm"})
        for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            out[f"{new}.{ours}.weight"] = source[f"{old}.{theirs}.weight"][:, :, None, None]
            out[f"{new}.{ours}.bias"] = source[f"{old}.{theirs}.bias"]
    return out


def _count(source: Mapping[str, Tensor], start: str) -> int:
    return len({name[len(start) :].split(".")[0] for name in source if name.startswith(start)})


def load_folder(folder: Path) -> Tensors:
    """All tensors of a component's folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def write(tensors: Mapping[str, Tensor], file: Path, prefix: str = "") -> Path:
    """Save under ``prefix``."""
    save_file({prefix + k: v.contiguous().clone() for k, v in tensors.items()}, file)
    return file


def write_single_files(hub: Path, folder: Path) -> dict[str, Path]:
    """The networks of a hub folder as the single files that people keep; name -> file."""
    folder.mkdir()
    clip_tensors = load_folder(hub / "text_encoder")
    positions = torch.arange(CLIP_LENGTH)[None]
    t5_tensors = load_folder(hub / "text_encoder_2")
    return {
        "model": write(
            bfl_transformer(load_folder(hub / "transformer")),
            folder / "flux1-kontext-dev.safetensors",
        ),
        "vae": write(bfl_vae(load_folder(hub / "vae")), folder / "ae.safetensors"),
        "text_encoder": write(
            {**clip_tensors, "text_model.embeddings.position_ids": positions},
            folder / "clip_l.safetensors",
        ),
        "text_encoder_2": write(
            {**t5_tensors, "encoder.embed_tokens.weight": t5_tensors["shared.weight"]},
            folder / "t5xxl.safetensors",
        ),
    }


def to_fp8(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensors]:
    """Quantise the blocks' matrices: (values, scale) of each, and what stays, in bf16."""
    quantised, rest = {}, {}
    for name, value in tensors.items():
        if name.endswith(".weight") and "_blocks." in name:
            scale = value.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            quantised[name] = ((value / scale).to(torch.float8_e4m3fn), scale)
        else:
            rest[name] = value.to(torch.bfloat16)
    return quantised, rest


def write_comfy_fp8(tensors: Mapping[str, Tensor], file: Path, prefix: str, newer: bool) -> Tensors:
    """ComfyUI's scaled fp8, in its first or its newer form; returns the values it stands for."""
    quantised, rest = to_fp8(tensors)
    stored = dict(rest)
    if not newer:
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    for name, (values, scale) in quantised.items():
        module = name.removesuffix(".weight")
        stored[name] = values
        if newer:
            about = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{module}.weight_scale"] = scale
            stored[f"{module}.comfy_quant"] = torch.tensor(list(about), dtype=torch.uint8)
        else:
            stored[f"{module}.scale_weight"] = scale[None]
            stored[f"{module}.scale_input"] = torch.ones(1)
    write(stored, file, prefix)
    exact = {name: values.float() * scale for name, (values, scale) in quantised.items()}
    return {name: exact[name] if name in exact else rest[name].float() for name in tensors}
