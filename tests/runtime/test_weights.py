"""Damaged, incomplete and foreign safetensors: one error that says what is wrong, or no loss."""

import json
import os
import string
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fluxkontext.runtime import CheckpointError
from fluxkontext.runtime.checkpoint import Component
from fluxkontext.runtime.layouts import identity
from fluxkontext.runtime.loading import load
from fluxkontext.runtime.weights import collapse, match, read_headers


class Net(nn.Module):
    """Something small to load, with a tensor of every kind of shape and two of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.blocks = nn.ModuleList(nn.Linear(3, 5) for _ in range(2))
        self.scale = nn.Parameter(torch.empty(7))


def random_state(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=rng)
        for name, tensor in Net().state_dict().items()
    }


STATE = random_state()


def load_net(*files: Path) -> dict[str, Tensor]:
    """By the way that every network takes."""
    component = Component("net", read_headers(files), None, "bfl", identity)
    module = load(component, lambda _: Net(), torch.device("cpu"), torch.float32)
    return dict(module.state_dict())


def assert_error_or_same(file: Path) -> bool:
    """Loading ``file`` raises the one error that it may, or gives the tensors of ``STATE``."""
    try:
        loaded = load_net(file)
    except CheckpointError:
        return False
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of ``STATE`` with metadata."""
    file = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file(STATE, file, metadata={"format": "pt"})
    assert assert_error_or_same(file)
    return file.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "model.safetensors"


def header_size(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def write_raw(file: Path, header: Mapping[str, Any] | bytes, payload: bytes) -> Path:
    """A safetensors file by hand, with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return file


def test_a_file_cut_anywhere_is_damaged(whole: bytes, scratch: Path) -> None:
    for length in range(len(whole)):
        scratch.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a"):
            load_net(scratch)


def test_a_longer_file_is_damaged(whole: bytes, scratch: Path) -> None:
    scratch.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        load_net(scratch)


def test_every_flipped_bit_of_length_and_header_is_found_or_harmless(
    whole: bytes, scratch: Path
) -> None:
    harmless = 0
    for bit in range(8 * header_size(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        scratch.write_bytes(data)
        harmless += assert_error_or_same(scratch)
    # spaces of the padding and the text of the metadata, no more
    assert harmless <= 8 * (len("format") + len("pt") + 8)


@given(data=st.data())
def test_any_byte_of_the_header_replaced(whole: bytes, scratch: Path, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, header_size(whole) - 1))
    value = data.draw(st.integers(0, 255) | st.sampled_from(b'{}[]",:\\0129'))
    scratch.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    assert_error_or_same(scratch)


@given(data=st.data())
def test_any_piece_of_the_header_replaced(whole: bytes, scratch: Path, data: st.DataObject) -> None:
    """The length is corrected, so that the change reaches the parser and the checks behind it."""
    size = header_size(whole)
    start = data.draw(st.integers(8, size))
    end = data.draw(st.integers(start, min(size, start + 20)))
    piece = data.draw(
        st.binary(max_size=20) | st.text(string.printable, max_size=20).map(str.encode)
    )
    write_raw(scratch, whole[8:start] + piece + whole[end:size], whole[size:])
    assert_error_or_same(scratch)


@given(data=st.data())
def test_any_offset_or_shape_replaced(whole: bytes, scratch: Path, data: st.DataObject) -> None:
    size = header_size(whole)
    header = json.loads(whole[8:size])
    entry = header[data.draw(st.sampled_from(sorted(STATE)))]
    field = data.draw(st.sampled_from(["data_offsets", "shape"]))
    number = st.integers(-2, 300) | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1, 2**64])
    entry[field] = data.draw(st.lists(number, max_size=4))
    write_raw(scratch, header, whole[size:])
    assert_error_or_same(scratch)


def test_a_flipped_length_allocates_nothing(
    whole: bytes, tmp_path: Path, namespace_env: dict[str, str]
) -> None:
    """Every value of each byte of the length, with an address space that forbids what it claims."""
    (tmp_path / "whole").write_bytes(whole)
    code = """
import resource
from pathlib import Path
from fluxkontext.runtime import CheckpointError
from fluxkontext.runtime.weights import read_headers
whole = Path("whole").read_bytes()
file = Path("flipped.safetensors")
file.write_bytes(whole)
read_headers([file])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)
found = 0
for place in range(8):
    for value in set(range(256)) - {whole[place]}:
        file.write_bytes(whole[:place] + bytes([value]) + whole[place + 1:])
        try:
            read_headers([file])
        except CheckpointError:
            found += 1
print(found)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=namespace_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("2040\n", "")


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16],
)
def test_unsupported_types_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({**STATE, "scale": torch.ones(7).to(dtype)}, file)
    stored = read_headers([file]).tensors["scale"].dtype
    with pytest.raises(CheckpointError, match=rf"of unsupported type {stored} scale \(supported:"):
        load_net(file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_supported_types_are_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({**STATE, "scale": STATE["scale"].to(dtype)}, file)
    assert torch.equal(load_net(file)["scale"], STATE["scale"].to(dtype).float())


def test_everything_wrong_is_named_at_once(tmp_path: Path) -> None:
    state = dict(STATE)
    del state["blocks.0.weight"], state["blocks.1.weight"], state["conv.bias"]
    state |= {"blocks.0.bias": torch.ones(6), "scale": torch.ones(7, dtype=torch.int64)}
    state |= {f"extra.{i}.{j}.weight": torch.ones(1) for i in range(3) for j in (0, 2)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_net(tmp_path / "model.safetensors")
    problem = str(caught.value)
    assert "\n" not in problem
    assert problem.startswith("net: expected the 7 tensors of the model, found tensors ")
    for part in (
        "missing conv.bias, blocks.{0-1}.weight",
        "unexpected extra.{0-2}.{0,2}.weight",
        "mis-shaped blocks.0.bias (first: found [6] for [5])",
        "of unsupported type I64 scale",
        str(tmp_path / "model.safetensors"),
    ):
        assert part in problem


@pytest.mark.parametrize("shape", [(), (1,), (5, 3, 1), (3, 5), (15,), (0, 3), (5, 0)])
def test_a_wrong_shape_of_any_rank(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({**STATE, "blocks.0.weight": torch.ones(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mis-shaped blocks\.0\.weight"):
        load_net(tmp_path / "model.safetensors")


def test_halves_of_an_odd_tensor_are_mis_shaped(tmp_path: Path) -> None:
    from fluxkontext.runtime.layouts import Piece

    file = tmp_path / "model.safetensors"
    save_file({"stored": torch.ones(9, 2)}, file)
    halves = (Piece("stored", 1), Piece("stored", 0))
    with pytest.raises(CheckpointError, match=r"mis-shaped stored \(first: found \[9, 2\]"):
        match("net", {"swapped": (8, 2)}, read_headers([file]), lambda _: halves)


def test_a_name_in_two_shards_is_found(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(STATE, one)
    save_file({"scale": STATE["scale"]}, two)
    with pytest.raises(CheckpointError, match=r"two.*expected scale once, found it in .*one"):
        load_net(one, two)


def test_shards_are_one_model(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file({name: t for name, t in STATE.items() if name.startswith("blocks")}, one)
    save_file({name: t for name, t in STATE.items() if not name.startswith("blocks")}, two)
    loaded = load_net(one, two)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize(
    ("scale", "problem"),
    [
        ({"blocks.0.scale_weight": torch.ones(4)}, r"mis-shaped blocks\.0\.scale_weight"),
        ({"nothing.scale_weight": torch.ones(1)}, r"unexpected nothing\.scale_weight"),
    ],
)
def test_scales_are_checked_too(scale: dict[str, Tensor], problem: str, tmp_path: Path) -> None:
    save_file({**STATE, **scale}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=problem):
        load_net(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "scale", [torch.tensor(0.5), torch.full((5,), 0.5), torch.full((5, 1), 0.5)]
)
def test_scales_of_a_tensor_or_of_its_rows(scale: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({**STATE, "blocks.0.scale_weight": scale}, file)
    assert torch.equal(load_net(file)["blocks.0.weight"], STATE["blocks.0.weight"] * 0.5)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(
            CheckpointError, match=r"expected a (readable )?safetensors file, found"
        ):
            read_headers([path])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(STATE, file)
    file.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        read_headers([file])


@pytest.mark.parametrize(
    ("names", "brief"),
    [
        ([], ""),
        (["a.weight"], "a.weight"),
        (["a.3.weight"], "a.3.weight"),
        ([f"blocks.{i}.qkv.weight" for i in range(19)], "blocks.{0-18}.qkv.weight"),
        (["a.0.b", "a.2.b", "a.5.b"], "a.{0,2,5}.b"),
        ([f"a.{i}.{j}.b" for i in range(2) for j in range(3)], "a.{0-1}.{0-2}.b"),
        (["a.1", "b.1", "a.2"], "a.{1-2}, b.1"),
        (["{", "a{b}.0", "%s{}"], "{, a{b}.0, %s{}"),
    ],
)
def test_collapse(names: list[str], brief: str) -> None:
    assert collapse(names) == brief


@given(st.lists(st.text(max_size=20) | st.from_regex(r"[ab]\.[0-9]{1,30}\.w", fullmatch=True)))
def test_collapse_takes_any_names_and_leaves_none_out(names: list[str]) -> None:
    brief = collapse(iter(names))
    assert len(brief) <= 2 * sum(len(name) + 4 for name in names)
    for name in names:
        if not any(c in string.digits for c in name):
            assert name in brief


def test_headers_alone_are_read(tmp_path: Path) -> None:
    """A sparse file of 64 GiB is indexed as quickly as a small one."""
    header = {"w": {"dtype": "BF16", "shape": [2**17, 2**18], "data_offsets": [0, 2**36]}}
    file = write_raw(tmp_path / "model.safetensors", header, b"")
    os.truncate(file, file.stat().st_size + 2**36)
    stored = read_headers([file]).tensors["w"]
    assert (stored.dtype, stored.shape) == ("BF16", (2**17, 2**18))
    assert np.prod(stored.shape, dtype=np.int64) == 2**35
