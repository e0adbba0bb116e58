"""Callbacks: what they see, what they may change, and what ends in them."""

from typing import Any

import numpy as np
import pytest
import torch

from fluxkontext.runtime import (
    KontextError,
    KontextPipeline,
)

from .edits import EDIT


@pytest.mark.usefixtures("still_works")
def test_a_callback_sees_every_step(pipe: KontextPipeline, usual: Any) -> None:
    seen: list[tuple[int, float, Any]] = []

    def look(it: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        assert it is pipe
        assert sorted(tensors) == ["latents"]
        assert tensors["latents"].dtype == np.float32
        seen.append((step, timestep, tensors["latents"]))
        return tensors

    found = pipe(**EDIT, callback_on_step_end=look).images
    np.testing.assert_array_equal(found, usual)
    np.testing.assert_array_equal(seen[-1][2], usual)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] == pytest.approx(1000)
    assert all(before > after > 0 for (_, before, _), (_, after, _) in zip(seen, seen[1:]))  # noqa: B905, RUF007
    assert not np.array_equal(seen[0][2], seen[1][2])


@pytest.mark.usefixtures("still_works")
def test_a_callback_may_change_what_it_is_given_without_effect(
    pipe: KontextPipeline, usual: Any
) -> None:
    def spoil(_: Any, __: int, ___: float, tensors: dict[str, Any]) -> None:
        tensors["latents"][:] = 0

    np.testing.assert_array_equal(pipe(**EDIT, callback_on_step_end=spoil).images, usual)


@pytest.mark.usefixtures("still_works")
def test_a_callback_replaces_the_latents(pipe: KontextPipeline, usual: Any) -> None:
    flat = np.full_like(usual, 0.25)

    def replace(_: Any, step: int, __: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": flat} if step == 2 else {}

    for inputs in (["latents"], []):
        found = pipe(
            **EDIT, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=inputs
        )
        np.testing.assert_array_equal(found.images, flat)

    def replace_by_tensor(_: Any, step: int, __: float, tensors: dict[str, Any]) -> Any:
        return {"latents": torch.from_numpy(flat)} if step == 2 else None

    found = pipe(**EDIT, callback_on_step_end=replace_by_tensor)
    np.testing.assert_array_equal(found.images, flat)


@pytest.mark.parametrize("inputs", [[], (), None])
@pytest.mark.usefixtures("still_works")
def test_nothing_is_read_unless_asked_for(
    pipe: KontextPipeline, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: object) -> None:
        raise AssertionError("the latents were copied")

    monkeypatch.setattr(pipe.backend, "read", forbidden)
    seen: list[dict[str, Any]] = []
    pipe(
        **EDIT | {"output_type": "np"},
        callback_on_step_end=lambda *arguments: seen.append(arguments[3]),
        callback_on_step_end_tensor_inputs=inputs,
    )
    assert seen == [{}, {}, {}]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.usefixtures("still_works")
def test_an_error_in_a_callback_comes_out_as_it_is(
    pipe: KontextPipeline, error: type[BaseException], at: int
) -> None:
    def fail(_: Any, step: int, *__: Any) -> None:
        if step == at:
            raise error("from the callback")

    with pytest.raises(error, match="from the callback"):
        pipe(**EDIT, callback_on_step_end=fail)


@pytest.mark.usefixtures("still_works")
def test_a_call_from_inside_is_an_error_and_no_deadlock(pipe: KontextPipeline) -> None:
    inner: list[BaseException] = []

    def call_again(it: KontextPipeline, *_: Any) -> None:
        for attempt in (lambda: it(**EDIT), it.close, it.clear_memos, it.warmup):
            with pytest.raises(KontextError, match="from inside its own callback") as caught:
                attempt()
            inner.append(caught.value)

    pipe(**EDIT, callback_on_step_end=call_again)
    assert len(inner) == 4 * 3
