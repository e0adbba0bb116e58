"""JSON files of a model: changed in place, and any JSON that may be in one."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2, 3, 64, 127, 128, 2**20, 2**31, 2**63, 10**30])
    | st.floats()
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def change(file: Path, **values: Any) -> None:
    """Set values of the object in ``file``."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
