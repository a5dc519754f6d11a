"""Going backwards block by block gives the gradient of the whole graph, wherever a model is a chain of blocks, and says what it will take."""

import pytest
import torch
from torch import nn

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.lens import cost, influence
from ssmlens.lens.jacobian import Backward
from ssmlens.lens.progress import Silent
from ssmlens.lens.subject import Access, Subject

from .models import hybrid, model, tokens
from .systems import ACCESS


def theirs(name):
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "bos_token_id": None, "eos_token_id": None}
    match name:
        case "gpt2":
            return transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=None, eos_token_id=None
                )
            )
        case "llama":
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**sizes, num_attention_heads=2, intermediate_size=32)
            )
        case _:
            return transformers.GPTNeoXForCausalLM(
                transformers.GPTNeoXConfig(**sizes, num_attention_heads=2, intermediate_size=32)
            )


SUBJECTS = {
    "mamba": lambda: model(n_layers=3),
    "mlp": lambda: model(mlp="swiglu"),
    "hybrid": lambda: hybrid(1),
    "s4": lambda: model(mixer="s4"),
    "attention": lambda: model(mixer="attention", mlp="gelu"),
    "gpt2": lambda: theirs("gpt2"),
    "llama": lambda: theirs("llama"),
    "neox": lambda: theirs("neox"),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_block_by_block_is_the_whole_graph(name):
    torch.manual_seed(1)
    subject, x = Subject(name, SUBJECTS[name]()), tokens(2, 20)
    backward = Backward(subject, x)
    assert backward.in_blocks
    assert backward.depths == len(subject.blocks)
    vectors = [torch.randn(2, 16) for _ in range(3)]

    def ask(hidden):
        return hidden[:, 11]

    steps = []
    found = {depth: [g.clone() for g in gs] for depth, gs in backward(x, ask, vectors, step=steps.append)}
    assert list(found) == list(range(backward.depths, 0, -1))
    assert sum(steps) == 3 * backward.depths
    with subject.still():
        embeddings = subject.embed(x).detach().requires_grad_()
        y = ask(subject.run(embeddings))
        for v, g in zip(vectors, found[1], strict=True):
            (wanted,) = torch.autograd.grad(y, embeddings, v, retain_graph=True)
            torch.testing.assert_close(g, wanted, rtol=1e-4, atol=1e-7)
            assert not g[:, 12:].any(), "later tokens cannot matter"


def test_the_gradient_at_every_depth_is_that_of_what_enters_the_block():
    subject, x = Subject("mamba", model(n_layers=3)), tokens(1, 16)
    (v,) = [torch.randn(1, 16)]
    found = {depth: gs[0].clone() for depth, gs in Backward(subject, x)(x, lambda hidden: hidden[:, -1], [v])}
    stream = subject.embed(x).detach()
    for depth, block in enumerate(subject.blocks, start=1):
        entering = stream.detach().requires_grad_()
        hidden = entering
        for later in subject.blocks[depth - 1 :]:
            hidden = later(hidden)[0]
        (wanted,) = torch.autograd.grad(subject.model.backbone.norm(hidden)[:, -1], entering, v)
        torch.testing.assert_close(found[depth], wanted, rtol=1e-4, atol=1e-7)
        stream = block(stream)[0]


class Reminded(nn.Module):
    """Its blocks read the embeddings too: not a chain."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 8))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.outside = nn.Linear(8, 8)

    def forward(self, x):
        h = x
        for block in self.blocks:
            h = h + block(h).cumsum(1) + self.outside(x)
        return h


def test_what_is_no_chain_keeps_the_whole_graph():
    access = Access(ACCESS.embed, ACCESS.run, blocks=lambda m: list(m.blocks), mixer=lambda b: None)
    subject, x = Subject("reminded", Reminded(), access), tokens(1, 16, 16)
    backward = Backward(subject, x)
    assert not backward.in_blocks
    assert backward.depths == 1
    found = influence.measure(subject, x, method="exact", floor=0.0)
    assert found.n_layers == 1
    assert "influence-by-layer" not in {f.id for f in found.figures()}
    bare = influence.measure(Subject("reminded", subject.model, ACCESS), x, method="exact", floor=0.0)
    assert found.score == pytest.approx(bare.score, rel=1e-6)


@pytest.mark.parametrize("name", ["mamba", "attention"])
def test_influence_in_groups_and_batches_is_the_same(name, monkeypatch):
    subject, x = Subject(name, SUBJECTS[name]()), tokens(3, 24)
    whole = influence.measure(subject, x, probes=5, targets=2)
    monkeypatch.setattr(cost, "_VECTORS_AT_ONCE", 3 * 24 * 16)
    parts = influence.measure(subject, x, probes=5, targets=2, batch_size=2)
    assert parts.cost.group < whole.cost.group
    assert parts.by_depth == pytest.approx(whole.by_depth, rel=1e-4)
    assert parts.by_depth.shape == (len(subject.blocks), 3, parts.squares.shape[1])


def planned(free, n=4, length=512, count=16):
    subject, x = Subject("mamba", model()), tokens(n, length)
    return cost.plan(Backward(subject, x), x, lambda h: h[:, -1], [torch.ones(1, 16)] * 3, count, n, free)


def test_less_memory_means_fewer_at_a_time_then_a_refusal():
    roomy = planned(2**34)
    assert (roomy.batch, roomy.group) == (4, 16)
    tight = planned(int(roomy.bytes / 3))
    assert tight.bytes < 0.8 * roomy.bytes / 3
    assert (tight.batch, tight.group) < (roomy.batch, roomy.group)
    with pytest.raises(
        UserError, match=r"mamba: influence over 512 tokens needs .* of memory, 1 MiB are free; give a smaller length"
    ):
        planned(10 * 1024)


def test_memory_is_linear_in_the_length():
    assert planned(2**40, n=1, length=8192, count=1).bytes == pytest.approx(
        4 * planned(2**40, n=1, length=2048, count=1).bytes, rel=0.01
    )


def test_what_it_will_take_is_said_before_it_begins():
    said = []

    class Told(Silent):
        def begin(self, what, steps):
            said.append(what)

        def say(self, what):
            said.append(what)

    found = influence.measure(Subject("m", model()), tokens(1, 40), progress=Told())
    assert said == [f"m: influence will take {found.cost}", "m: influence"]
    assert "memory" in said[0]
    assert found.cost.seconds > 0


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "a second"), (12, "12 s"), (119, "2 min"), (7200, "2.0 h")])
def test_durations(seconds, words):
    assert cost.duration(seconds) == words


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_is_a_chain(name):
    x = tokens(1, 16)
    assert Backward(Subject(name, model(mixer=name)), x).in_blocks
