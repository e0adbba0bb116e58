"""One call at a time: cancelled, too late, in order of arrival, refused, and closed."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.runtime import (
    CancelledError,
    ClosedError,
    DeadlineError,
    KontextPipeline,
    QueueFullError,
)

from .edits import EDIT, photo, waiting


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


class Call(threading.Thread):
    """A call in a thread of its own; its result or its error is kept."""

    def __init__(self, pipe: KontextPipeline, **arguments: Any) -> None:
        super().__init__(daemon=True)
        self.pipe, self.arguments = pipe, arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.pipe(**self.arguments)
        except BaseException as error:
            self.error = error

    def done(self) -> "Call":
        self.join(30)
        assert not self.is_alive()
        return self


class Held:
    """A call that stays inside the pipeline, at its first step, until it is let go."""

    def __init__(self, pipe: KontextPipeline) -> None:
        self.go, inside = threading.Event(), threading.Event()

        def hold(_: Any, step: int, *__: Any) -> None:
            inside.set()
            assert self.go.wait(30)

        self.call = Call(pipe, **EDIT, callback_on_step_end=hold)
        assert inside.wait(30)

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self.call.done()


# limits of a call


@pytest.mark.usefixtures("still_works")
def test_cancelled_before_it_starts(pipe: KontextPipeline) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        pipe(**EDIT, cancel=cancel)


@pytest.mark.usefixtures("still_works")
def test_cancelled_in_mid_run(pipe: KontextPipeline) -> None:
    cancel, steps = threading.Event(), []

    def stop(_: Any, step: int, *__: Any) -> None:
        steps.append(step)
        if step == 1:
            cancel.set()

    with pytest.raises(CancelledError):
        pipe(**EDIT | {"num_inference_steps": 50}, cancel=cancel, callback_on_step_end=stop)
    assert steps == [0, 1]


@pytest.mark.usefixtures("still_works")
def test_too_late_in_mid_run(pipe: KontextPipeline) -> None:
    steps: list[int] = []

    def dawdle(_: Any, step: int, *__: Any) -> None:
        steps.append(step)
        time.sleep(0.6)

    with pytest.raises(DeadlineError, match=r"expected to finish in 0\.5 s, found \d\.\d\d s gone"):
        pipe(**EDIT | {"num_inference_steps": 50}, deadline=0.5, callback_on_step_end=dawdle)
    assert steps in ([0], [])


def test_a_deadline_that_is_kept(pipe: KontextPipeline, usual: Any) -> None:
    np.testing.assert_array_equal(pipe(**EDIT, deadline=1000).images, usual)


@pytest.mark.usefixtures("still_works")
def test_cancelled_and_too_late_while_waiting(pipe: KontextPipeline) -> None:
    cancel = threading.Event()
    with Held(pipe) as held:
        cancelled = Call(pipe, **EDIT, cancel=cancel)
        until(lambda: waiting(pipe) == 2)
        late = Call(pipe, **EDIT, deadline=0.1)
        assert isinstance(late.done().error, DeadlineError)
        cancel.set()
        assert isinstance(cancelled.done().error, CancelledError)
        assert waiting(pipe) == 1
        assert held.call.is_alive()
    assert held.call.error is None


# threads


@pytest.mark.usefixtures("still_works")
def test_eight_threads_get_what_each_gets_alone(pipe: KontextPipeline) -> None:
    edits = [
        EDIT
        | {
            "prompt": f"edit {i}",
            "seed": i,
            "image": [None, photo(i), [photo(i), photo(i + 1)]][i % 3],
            "height": 32 + 16 * (i % 2),
            "width": 48,
            "max_area": 48 * (32 + 16 * (i % 2)),
            "output_type": ["latent", "np"][i % 2],
        }
        for i in range(8)
    ]
    alone = [pipe(**edit).images for edit in edits]
    pipe.clear_memos()
    calls = [Call(pipe, **edit) for edit in edits for _ in range(2)]
    for i, call in enumerate(calls):
        assert call.done().error is None
        np.testing.assert_array_equal(call.result.images, alone[i // 2])


@pytest.mark.usefixtures("still_works")
def test_calls_are_served_in_the_order_of_arrival(pipe: KontextPipeline) -> None:
    served: list[int] = []
    calls = []
    with Held(pipe):
        for i in range(8):
            calls.append(Call(pipe, **EDIT, callback_on_step_end=lambda *_, i=i: served.append(i)))
            until(lambda i=i: waiting(pipe) == i + 2)  # type: ignore[misc]
        assert served == []
    for call in calls:
        assert call.done().error is None
    assert served == [i for i in range(8) for _ in range(3)]
    assert min(call.result.timings["queue"] for call in calls) > 0


def test_a_full_queue_refuses(small_model: Path, usual: Any) -> None:
    for limit in (0, 2):
        with KontextPipeline.from_pretrained(small_model, device="cpu", max_queue=limit) as pipe:
            with Held(pipe):
                calls = []
                for i in range(limit):
                    calls.append(Call(pipe, **EDIT))
                    until(lambda i=i: waiting(pipe) == i + 2)  # type: ignore[misc]
                with pytest.raises(QueueFullError, match=f"at most {limit} waiting calls"):
                    pipe(**EDIT)
            for call in calls:
                np.testing.assert_array_equal(call.done().result.images, usual)
            np.testing.assert_array_equal(pipe(**EDIT).images, usual)


def test_closing_lets_one_finish_and_refuses_the_rest(small_model: Path, usual: Any) -> None:
    pipe = KontextPipeline.from_pretrained(small_model, device="cpu")
    with Held(pipe) as held:
        calls = [Call(pipe, **EDIT) for _ in range(3)]
        until(lambda: waiting(pipe) == 4)
        closer = threading.Thread(target=pipe.close)
        closer.start()
        for call in calls:
            assert isinstance(call.done().error, ClosedError)
        with pytest.raises(ClosedError):
            pipe(**EDIT)
        assert closer.is_alive()
    np.testing.assert_array_equal(held.call.result.images, usual)
    closer.join(30)
    assert not closer.is_alive()
    pipe.close()
    for call_again in (lambda: pipe(**EDIT), pipe.warmup, pipe.clear_memos):
        with pytest.raises(ClosedError, match="found a closed one; load it again"):
            call_again()


def test_leaving_the_block_closes(small_model: Path) -> None:
    with (
        pytest.raises(ValueError, match="inside"),
        KontextPipeline.from_pretrained(small_model, device="cpu") as pipe,
    ):
        raise ValueError("inside")
    with pytest.raises(ClosedError):
        pipe(**EDIT)
