"""What a stage leaves in its folder: a log, a state to go on from, its weights and its result."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Records:
    """The folder of one stage; every file but the log is replaced whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state = folder / "state.pt"
        self._weights = folder / "weights.safetensors"
        self._result = folder / "result.json"

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one line of JSON, and print it."""
        line = json.dumps({"time": round(time.time(), 1), **entry})
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Keep what a stopped run needs to go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._state.with_suffix(".part")
        torch.save(dict(state), part)
        os.replace(part, self._state)

    def load_state(self) -> dict[str, Any] | None:
        """The last state, or None."""
        if not self._state.exists():
            return None
        state: dict[str, Any] = torch.load(self._state, map_location="cpu", weights_only=True)
        return state

    def save_weights(self, weights: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
        """Keep averaged weights, in bf16 as they will ship, and the facts about them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._weights.with_suffix(".part")
        rounded = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in weights.items()}
        save_file(rounded, part, metadata={"format": "pt"})
        os.replace(part, self._weights)
        part = self._result.with_suffix(".part")
        part.write_text(json.dumps(dict(result), indent=2) + "\n", encoding="utf-8")
        os.replace(part, self._result)

    def load_weights(self) -> dict[str, Tensor] | None:
        """The weights that were kept last, or None."""
        return load_file(self._weights) if self._weights.exists() else None

    def result(self) -> dict[str, Any]:
        """The facts about the weights; empty if there are none."""
        if not self._result.exists():
            return {}
        found: dict[str, Any] = json.loads(self._result.read_text(encoding="utf-8"))
        return found

    @property
    def done(self) -> bool:
        """Whether the stage has used up its budget."""
        return bool(self.result().get("done"))
