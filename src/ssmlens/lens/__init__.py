"""Looking at models: what they forget, where they blur. Each measurement alone, or all together.

    from ssmlens.lens import influence, smoothing, transitions, context, bounds, filters, hidden_attention, diagnose
    influence.measure(model, tokens)         how much each token moves the output, by its distance
    reading.measure(model, inputs)           which inputs move a classifier's answer
    context.measure(model, tokens)           what the distant context is worth in bits per token
    smoothing.measure(model, tokens)         how different a sequence's tokens still are, layer by layer
    transitions.measure(model, tokens)       what each layer's a_t are, how far they move, how long they remember
    bounds.measure(model, tokens)            Theorems 3.1 and 4.2: what they guarantee, beside what is so
    filters.measure(model, tokens)           which frequencies a layer lets through
    hidden_attention.measure(model, tokens)  which tokens each output of a recurrent layer is made of
    diagnose({"a": model, "b": other}, tokens).record()

Every result has figures(), tables(), maps() and plot(), and shows itself in a notebook. A model is a ssmlens LanguageModel, a transformers causal
language model, or a `Subject` made by hand.
"""

from ssmlens.lens import bounds, context, filters, hidden_attention, influence, reading, smoothing, transitions
from ssmlens.lens.diagnosis import Diagnosis, diagnose
from ssmlens.lens.measures import MEASURES
from ssmlens.lens.progress import Bars, Progress
from ssmlens.lens.subject import Access, Subject

__all__ = [
    "MEASURES", "Access", "Bars", "Diagnosis", "Progress", "Subject", "bounds", "context", "diagnose", "filters", "hidden_attention", "influence", "reading",
    "smoothing", "transitions",
]  # fmt: skip
