"""Looking at models: what they forget, where they blur. Each measurement alone, or all together.

    from ssmlens.lens import influence, smoothing, transitions, context, diagnose
    influence.measure(model, tokens)        how much each token moves the output, by its distance
    smoothing.measure(model, tokens)        how different a sequence's tokens still are, layer by layer
    transitions.measure(model, tokens)      what each layer's a_t are, how far they move, how long they remember
    context.measure(model, tokens)          what the distant context is worth in bits per token
    diagnose({"a": model, "b": other}, tokens).record()

A model is a ssmlens LanguageModel, a transformers causal language model, or a `Subject` made by hand.
"""

from ssmlens.lens import context, influence, smoothing, transitions
from ssmlens.lens.diagnosis import MEASURES, Diagnosis, diagnose
from ssmlens.lens.progress import Bars, Progress
from ssmlens.lens.subject import Access, Subject

__all__ = [
    "MEASURES", "Access", "Bars", "Diagnosis", "Progress", "Subject", "context", "diagnose", "influence", "smoothing", "transitions",
]  # fmt: skip
