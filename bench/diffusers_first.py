"""A new process's first picture with diffusers: what `fluxkontext edit` is compared with.

Run as a module, with one JSON object of arguments. It imports nothing of this project.
"""

import json
import sys
import time
from typing import Any


def main(arguments: dict[str, Any]) -> None:
    """model, dtype, images, output, seed, and ``call``: the pipeline's own arguments."""
    started = time.perf_counter()
    import torch
    from diffusers import FluxKontextPipeline
    from PIL import Image

    pipe = FluxKontextPipeline.from_pretrained(
        arguments["model"], dtype=getattr(torch, arguments["dtype"])
    )
    pipe.to(arguments["device"])
    pipe.set_progress_bar_config(disable=True)
    loaded = time.perf_counter()
    picture = pipe(
        image=Image.open(arguments["image"]),
        generator=torch.Generator().manual_seed(arguments["seed"]),
        _auto_resize=False,
        **arguments["call"],
    ).images[0]
    done = time.perf_counter()
    picture.save(arguments["output"])
    print(json.dumps({"timings": {"load": loaded - started, "total": done - loaded}}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
