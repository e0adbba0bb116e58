"""What an error says, which is one line."""

from collections.abc import Callable

import pytest

from fluxkontext.runtime import CheckpointError, KontextError


def problem_of(call: Callable[[], object], error: type[KontextError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
