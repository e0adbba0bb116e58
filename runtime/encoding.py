"""From placed jobs to what a backend starts with: prompts and pictures encoded, or remembered."""

import hashlib
from collections.abc import Sequence

import numpy as np

from .backend import Backend, Batch, Embeddings, Floats, Handle, TokenIds
from .geometry import Grid, position_ids
from .jobs import Job
from .memo import Memo
from .request import Picture, Text
from .result import Sampling
from .tokenizer import PromptTokenizer
from .watch import Watch


class Encoder:
    """Encodes texts by prompt and pictures by content, each once as long as it is remembered."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: PromptTokenizer,
        tokenizer_2: PromptTokenizer,
        grid: Grid,
        memo_entries: int,
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self.grid = grid
        self.texts: Memo[Handle] = Memo(memo_entries)
        self.images: Memo[Handle] = Memo(memo_entries)

    def batch(self, jobs: Sequence[Job], sigmas: Floats, sampling: Sampling, watch: Watch) -> Batch:
        """Jobs of equal shape as one batch."""
        with watch.stage("text"):
            text, negative = (
                [self._text(t, sampling.max_sequence_length) for t in texts if t is not None]
                for texts in ([j.edit.text for j in jobs], [j.edit.negative for j in jobs])
            )
        watch.check()
        with watch.stage("image"):
            contexts = [[self._image(picture) for picture in job.contexts] for job in jobs]
        watch.check()
        target = self.grid.tokens(jobs[0].target)
        context_sizes = [self.grid.tokens(size) for size in jobs[0].context_sizes]
        return Batch(
            text=text,
            negative=negative,
            contexts=contexts,
            noise=np.stack([job.noise for job in jobs]),
            positions=position_ids(target, context_sizes, sampling.context_layout),
            target=target,
            sigmas=sigmas,
            guidance_scale=sampling.guidance_scale,
            true_cfg_scale=sampling.true_cfg_scale,
        )

    def forget(self) -> None:
        """Drop what is remembered."""
        self.texts.clear()
        self.images.clear()

    def _text(self, text: Text, length: int) -> Handle:
        if isinstance(text, Embeddings):
            return self.backend.encode_text(text)
        ids = TokenIds(self.tokenizer(text.clip), self.tokenizer_2(text.t5, length))
        key = (ids.clip.tobytes(), ids.t5.tobytes())
        return self.texts.get(key, lambda: self.backend.encode_text(ids))

    def _image(self, picture: Picture) -> Handle:
        digest = hashlib.blake2b(np.ascontiguousarray(picture).data, digest_size=16).digest()
        key = (digest, picture.shape, picture.dtype.str)
        return self.images.get(key, lambda: self.backend.encode_image(picture))
