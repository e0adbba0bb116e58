"""Profiles, keys, locks, and which engines may run where: decided without an engine library."""

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxkontext.runtime.contract import GRAPHS, STEPS, Workload
from fluxkontext.runtime.engines import (
    Gpu,
    Recipe,
    check_shapes,
    choose_set,
    engine_key,
    is_qualified,
    why_not_here,
)
from fluxkontext.runtime.errors import EngineMismatchError
from fluxkontext.runtime.files import locked
from fluxkontext.runtime.geometry import Grid

ADA = Gpu("NVIDIA L4", "sm_89", 58, 24 * 2**30)
OTHER_ADA = Gpu("NVIDIA GeForce RTX 4090", "sm_89", 128, 24 * 2**30)
BLACKWELL = Gpu("NVIDIA GeForce RTX 5090", "sm_120", 170, 32 * 2**30)
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12
RTX = {"tensorrt-rtx": "1.7.1.116"}
sides = st.integers(1, 128).map(lambda tokens: 16 * tokens)


def test_the_profile_of_the_published_model() -> None:
    """1024x1024 with one context: 4096 + 4096 tokens, as BFL runs it; contexts of any preferred
    size have 4042 to 4150 tokens (semantics of the preferred sizes)."""
    axes = Workload(((1024, 1024),), (1, 1), 1, 512).axes(Grid())
    assert axes["target_tokens"] == (4096, 4096, 4096)
    assert axes["context_tokens"][1] == 4096
    assert axes["image_tokens"] == tuple(4096 + extent for extent in axes["context_tokens"])
    assert (axes["width"][0], axes["width"][2]) == (672, 1568)
    assert axes["steps"] == STEPS


def test_a_static_profile_has_one_size() -> None:
    axes = Workload(((1248, 832),), (2, 2), 3, 512, static=True).axes(Grid())
    varying = {name for name, (least, _, most) in axes.items() if least != most}
    assert varying == {"steps"}
    assert axes["batch"] == (3, 3, 3)
    assert axes["image_tokens"] == (3 * 78 * 52,) * 3


@given(
    sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=4),
    contexts=st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted),
    batch=st.integers(1, 4),
    static=st.booleans(),
)
def test_profiles_are_ordered_and_consistent(
    sizes: list[tuple[int, int]], contexts: list[int], batch: int, static: bool
) -> None:
    work = Workload(tuple(sizes), (contexts[0], contexts[1]), batch, 512, static)
    grid = Grid()
    for name, (inputs, _) in GRAPHS.items():
        fixed = {"features": 64, "rows": 344, "hidden": 3072, "context_in_dim": 4096}
        specs = {key: spec.sized({**fixed, "vec_in_dim": 768}) for key, spec in inputs.items()}
        profile = work.profile(name, specs, grid)
        for least, usual, most in profile.values():
            assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        if name == "transformer":
            for i in range(3):
                shape = {key: shapes[i] for key, shapes in profile.items()}
                assert shape["positions"][0] == shape["latents"][1] + shape["context"][1]
                assert shape["latents"] == shape["sample"]
        # what was asked for is inside
        for width, height in sizes:
            if name == "vae_decoder":
                inside = {"latents": (1, height // 16, width // 16, 64)}
                check_shapes(name, profile, inside)


def test_a_shape_outside_is_named() -> None:
    profile = {"ids": ((1, 77), (1, 77), (2, 77))}
    check_shapes("clip", profile, {"ids": (2, 77)})
    with pytest.raises(
        EngineMismatchError, match=r"clip: expected ids of 1x77 to 2x77, found 3x77"
    ):
        check_shapes("clip", profile, {"ids": (3, 77)})


@pytest.mark.parametrize(
    ("shapes", "option"),
    [
        ({"latents": (2, 16, 64)}, "--batch"),
        ({"latents": (1, 17, 64)}, "--size"),
        ({"context": (1, 33, 64)}, "--contexts"),
        ({"context": (1, 0, 64)}, "--contexts"),
    ],
)
def test_the_option_that_widens_it_is_named(
    shapes: dict[str, tuple[int, ...]], option: str
) -> None:
    profile = {"latents": ((1, 16, 64),) * 3, "context": ((1, 16, 64), (1, 16, 64), (1, 32, 64))}
    with pytest.raises(EngineMismatchError, match=f"with: fluxkontext build {option}$"):
        check_shapes("transformer", profile, shapes)


@pytest.mark.parametrize(
    ("least", "most", "tokens", "bound"), [(1, 32, 33, "at most 32"), (32, 32, 10, "32")]
)
def test_where_no_option_widens_it_the_limit_is_told(
    least: int, most: int, tokens: int, bound: str
) -> None:
    profile = {"text": ((1, least, 64), (1, most, 64), (1, most, 64))}
    with pytest.raises(EngineMismatchError, match=f"; pass {bound} tokens a prompt$"):
        check_shapes("transformer", profile, {"text": (1, tokens, 64)})


RECIPE = Recipe("tensorrt-rtx", "1.7.1.116", "sm_120", None, "bf16", ("strongly-typed",))


def test_a_key_depends_on_everything() -> None:
    facts: tuple[Any, ...] = ("graph", {"file": "digest"}, {"ids": ((1,), (1,), (2,))})
    changed = [
        (RECIPE, *facts),
        (replace(RECIPE, library="tensorrt"), *facts),
        (replace(RECIPE, version="1.7.1.117"), *facts),
        (replace(RECIPE, target="sm_89"), *facts),
        (replace(RECIPE, gpu=ADA), *facts),
        (replace(RECIPE, gpu=OTHER_ADA), *facts),
        (replace(RECIPE, precision="fp16"), *facts),
        (replace(RECIPE, flags=("strongly-typed", "x")), *facts),
        (RECIPE, "other graph", *facts[1:]),
        (RECIPE, facts[0], {"file": "other"}, facts[2]),
        (RECIPE, facts[0], {"other": "digest"}, facts[2]),
        (RECIPE, facts[0], facts[1], {"ids": ((1,), (1,), (3,))}),
    ]
    assert len({engine_key(*case) for case in changed}) == len(changed)
    assert engine_key(RECIPE, *facts) == engine_key(replace(RECIPE), *facts)


def entry(**changes: Any) -> dict[str, Any]:
    base = {"library": "tensorrt-rtx", "version": "1.7.1.116", "target": "sm_89", "gpu": None}
    return {**base, "qualified": {}, **changes}


@pytest.mark.parametrize(
    ("changes", "gpu", "reason"),
    [
        ({"target": "sm_120"}, ADA, r"expected a GPU of sm_120, found NVIDIA L4 of sm_89"),
        ({"version": "1.6.0"}, ADA, r"expected tensorrt-rtx 1.6.0, found 1.7.1.116"),
        ({"library": "tensorrt"}, ADA, r"expected tensorrt 1.7.1.116, found it not installed"),
        ({"gpu": {"name": "NVIDIA L4"}}, OTHER_ADA, r"expected NVIDIA L4, found NVIDIA GeForce"),
        ({}, ADA, r"did not pass on this NVIDIA L4 yet: run doctor"),
        ({"qualified": {"NVIDIA L4": {}}}, OTHER_ADA, r"did not pass on this NVIDIA GeForce"),
    ],
)
def test_engines_that_do_not_fit(changes: dict[str, Any], gpu: Gpu, reason: str) -> None:
    with pytest.raises(EngineMismatchError, match=reason) as caught:
        choose_set({"engines": {"it": entry(**changes)}}, gpu, RTX, qualified=True)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_engines_that_fit() -> None:
    passed = entry(qualified={ADA.name: {}})
    sets = {"blackwell": entry(target="sm_120"), "ada": passed}
    assert choose_set({"engines": sets}, ADA, RTX, qualified=True) == ("ada", passed)
    assert choose_set({"engines": sets}, BLACKWELL, RTX, qualified=False)[0] == "blackwell"
    assert is_qualified(passed, ADA)
    assert not is_qualified(passed, OTHER_ADA)
    both = entry(qualified={ADA.name: {}, OTHER_ADA.name: {}})
    assert is_qualified(both, ADA)
    assert is_qualified(both, OTHER_ADA)


def test_a_bundle_without_engines_says_so() -> None:
    assert why_not_here({}, "auto", "auto") == "the bundle has no engines"
    with pytest.raises(EngineMismatchError, match="found none in the bundle"):
        choose_set({}, ADA, RTX, qualified=False)


@pytest.mark.parametrize("device", ["cuda:x", "cuda:", "cuda:-1", "mps", "auto:1.5"])
def test_a_device_that_is_none_is_told(device: str) -> None:
    reason = why_not_here({"engines": {"ada": entry()}}, device, "auto")
    assert reason == f"device: expected auto, cuda or cuda:N for engines, found {device}"


def _append(file: str, count: int) -> None:
    """Read, change and write a file under a lock, often."""
    for _ in range(count):
        with locked(Path(file).with_suffix(".lock"), lambda: None):
            numbers = json.loads(Path(file).read_text())
            Path(file).write_text(json.dumps([*numbers, os.getpid()]))


def test_a_lock_is_held_by_one_process(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    file.write_text("[]")
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_append, args=(str(file), 50)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(json.loads(file.read_text())) == 150
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_a_process_that_dies_lets_go(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    fork = multiprocessing.get_context("fork")
    held = fork.Event()

    def hold() -> None:
        with locked(lock, lambda: None):
            held.set()
            os._exit(9)

    worker = fork.Process(target=hold)
    worker.start()
    assert held.wait(30)
    worker.join(30)
    waited: list[bool] = []
    with locked(lock, lambda: waited.append(True)):
        assert lock.exists()
    assert not waited
