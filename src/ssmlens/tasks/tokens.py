"""Text as the tokens of a model that has a tokenizer: `corpus`, but for what a token is."""

from collections.abc import Callable

import numpy as np

from ssmlens.errors import UserError
from ssmlens.tasks.corpus import Corpus, CorpusConfig, CorpusStream


class TokenStream(CorpusStream):
    """Batches of a CorpusConfig whose length counts tokens. encode: text → tokens below vocab_size.

    Raises UserError where the text has fewer tokens than a batch of windows, or its held-out part than one."""

    def __init__(self, config: CorpusConfig, encode: Callable[[str], list[int]], vocab_size: int) -> None:
        super().__init__(config)  # a text with too few bytes has too few tokens
        self._vocab_size = vocab_size
        parts = (self.corpus.train, self.corpus.heldout)
        ids = [np.array(encode(bytes(part).decode(errors="replace")), dtype=np.int64) for part in parts]
        self.corpus = Corpus(self.corpus.name, *ids)  # wider numbers than bytes
        self._windows = max(0, (len(ids[0]) - config.length) // config.length)
        if self._windows < config.batch_size:
            raise UserError(
                f"{self.corpus.name} has {len(ids[0]):,} tokens to train on; a batch of {config.batch_size} windows of {config.length} "
                f"needs {(config.batch_size + 1) * config.length:,}: give more text, a shorter length or a smaller batch"
            )
        if len(ids[1]) < config.length:
            raise UserError(
                f"the held-out text of {self.corpus.name} is {len(ids[1]):,} tokens long, shorter than the length {config.length:,}: "
                "give a longer text, more of it held out, or a shorter length"
            )

    @property
    def vocab_size(self) -> int:
        return self._vocab_size
