"""One sequence of very many tokens through a whole model, in a process of its own, whose memory is then that of this alone."""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from ssmlens.bench import memory
from ssmlens.bench.layer import Size


def _run(size: Size, threads: int) -> tuple[float, int | None]:
    import torch

    from ssmlens.models import LanguageModel, LanguageModelConfig

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = LanguageModel(
        LanguageModelConfig(
            vocab_size=size.vocab_size, d_model=size.d_model, n_layers=size.layers, mixer="mamba", polarization={"ones": 1, "zeros": 1},
        )
    ).eval()  # fmt: skip
    tokens = torch.randint(size.vocab_size, (1, size.length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=tokens[:, :16], labels=tokens[:, :16])  # what is loaded once is not timed
        begin = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        seconds = time.perf_counter() - begin
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"the loss over {size.length} tokens is {loss.item()}")
    return seconds, memory.resident("VmHWM") if sys.platform == "linux" else None


def measure(size: Size, threads: int) -> tuple[float, int | None]:
    """(seconds, bytes at the process's peak or None where the system does not tell)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, size, threads).result()
