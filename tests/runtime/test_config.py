"""Any JSON as a configuration: one error that says what is wrong, or networks that can be built."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fluxkontext.kernels import reference
from fluxkontext.runtime import CheckpointError
from fluxkontext.runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from fluxkontext.runtime.loading import build
from fluxkontext.runtime.models.clip import ClipText
from fluxkontext.runtime.models.t5 import T5Encoder
from fluxkontext.runtime.models.transformer import Flux
from fluxkontext.runtime.models.vae import Vae
from fluxkontext.runtime.schedule import SchedulerConfig

from .json_files import change, json_values

OPS = reference()
CONFIGS: dict[str, tuple[Any, Callable[[Any], Any], list[str]]] = {
    "transformer": (
        TransformerConfig,
        lambda config: Flux(config, OPS),
        [
            "_class_name",
            "patch_size",
            "in_channels",
            "out_channels",
            "num_layers",
            "num_single_layers",
            "attention_head_dim",
            "num_attention_heads",
            "joint_attention_dim",
            "pooled_projection_dim",
            "guidance_embeds",
            "axes_dims_rope",
        ],
    ),
    "vae": (
        VaeConfig,
        Vae,
        [
            "_class_name",
            "in_channels",
            "act_fn",
            "down_block_types",
            "up_block_types",
            "block_out_channels",
            "layers_per_block",
            "latent_channels",
            "norm_num_groups",
            "scaling_factor",
            "shift_factor",
            "force_upcast",
            "sample_size",
            "use_quant_conv",
            "mid_block_add_attention",
        ],
    ),
    "text_encoder": (ClipConfig, ClipText, [field.name for field in fields(ClipConfig)]),
    "text_encoder_2": (T5Config, T5Encoder, [field.name for field in fields(T5Config)]),
}


@pytest.mark.parametrize("part", CONFIGS)
@given(data=st.data())
def test_any_json_in_a_config(small_model: Path, part: str, data: st.DataObject) -> None:
    """Refused, or the shape of a network that can be made."""
    kind, network, names = CONFIGS[part]
    config = json.loads((small_model / part / "config.json").read_text())
    changes = data.draw(st.dictionaries(st.sampled_from(names), json_values, max_size=2))
    try:
        shape = kind.from_json(config | changes)
    except CheckpointError:
        return
    assert all(math.isfinite(value) for value in asdict(shape).values() if isinstance(value, float))
    if all(
        value <= 8 for name, value in asdict(shape).items() if "layers" in name or "depth" in name
    ):
        build(lambda: network(shape))


@given(
    values=st.dictionaries(
        st.sampled_from(
            [
                *SchedulerConfig.__dataclass_fields__,
                "_class_name",
                "shift_terminal",
                "time_shift_type",
            ]
        ),
        json_values,
    )
)
@example(values={"max_image_seq_len": 256})
@example(values={"max_shift": 1e5, "use_dynamic_shifting": True})
@example(values={"shift": 0})
def test_any_json_in_a_scheduler_config(values: dict[str, Any]) -> None:
    """Refused, or sigmas that fall from 1 to 0."""
    from fluxkontext.runtime.schedule import sigmas_for

    try:
        config = SchedulerConfig.from_json(values)
    except CheckpointError:
        return
    sigmas = sigmas_for(config, 4096, 4)
    assert sigmas[-1] == 0
    assert all(0 <= sigma <= 1 for sigma in sigmas)


@given(
    values=st.dictionaries(
        st.sampled_from(["pad_token", "eos_token", "bos_token", "unk_token", "model_max_length"]),
        json_values | st.fixed_dictionaries({"content": json_values}),
        min_size=1,
    )
)
def test_any_json_in_a_tokenizer_config(
    small_model: Path, tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    from fluxkontext.runtime.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    shutil.copytree(small_model / "tokenizer", folder)
    change(folder / "tokenizer_config.json", **values)
    try:
        tokenizer = load_tokenizer(folder, 77)
    except CheckpointError:
        return
    assert len(tokenizer("make it red")) == tokenizer.model_max_length
    shutil.rmtree(folder)
