"""The needle measurement against models whose answers are known, and its store."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from ssmlens.cli import devices
from ssmlens.cli.app import app
from ssmlens.errors import UserError
from ssmlens.experiments import needle, needle_record, reader
from ssmlens.lens.store import fingerprint
from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.results import Value
from ssmlens.tasks.facts import FACTS
from ssmlens.tasks.needle import Grid, Haystack, NeedleConfig, NeedleStream

TEXT = "One sentence here. Another one, a little longer, follows! And a third? " * 3


def encode(text):
    return list(text.encode())


def decode(ids):
    return bytes(i % 256 for i in ids).decode(errors="replace")


def grid(facts=FACTS[:3], shortest=700):
    return Grid.of(Haystack.of("text", TEXT, encode, shortest), facts, encode)


def small(mixer="mamba", **more):
    torch.manual_seed(0)
    return LanguageModel(LanguageModelConfig(vocab_size=256, d_model=16, n_layers=2, mixer=mixer, **more)).eval()


class Output:
    def __init__(self, logits, cache):
        self.logits, self.past_key_values = logits, cache


class Oracle(nn.Module):
    """Reads bytes, remembers the last `reach` of them, and completes what the needle it remembers said (else what the world says)."""

    def __init__(self, facts, reach):
        super().__init__()
        self.facts, self.reach = facts, reach
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        past = past_key_values.rows if past_key_values else [b""] * len(input_ids)
        rows = [old + bytes(new) for old, new in zip(past, input_ids.tolist(), strict=True)]
        length = input_ids.shape[1]
        logits = torch.full((len(rows), length, 256), -5.0)
        for i, row in enumerate(rows):
            for t in range(length):
                read = row[: len(row) - length + t + 1].decode()
                logits[i, t, self.next(read)] = 5.0
        return Output(logits[:, -logits_to_keep:] if logits_to_keep else logits, Rows(rows))

    def next(self, read):
        asked = read.rpartition("Answer: ")[2]
        for f in self.facts:
            if asked.startswith(f.cue):
                answer = f.context if f.needle in read[-self.reach :] else f.world
                rest = f" {answer}."[len(asked) - len(f.cue) :]
                return ord(rest[0]) if rest else 0
        return 0


class Rows:
    def __init__(self, rows):
        self.rows = rows

    def batch_repeat_interleave(self, count):
        self.rows = [row for row in self.rows for _ in range(count)]


def test_a_model_that_remembers_so_far_back_finds_needles_up_to_there():
    g, depths = grid(), [0.0, 0.25, 0.5, 0.75, 1.0]
    n = needle.measure_statements("oracle", Oracle(g.facts, 530), g, decode, [700], depths)
    assert [sum(n.cells[700, d].right) for d in depths] == [0, 0, 3, 3, 3]
    assert [sum(n.cells[700, d].generated) for d in depths] == [0, 0, 3, 3, 3]
    assert n.control[700].right == [0, 0, 0]
    assert (n.third(False).value, n.third(True).value, n.recency_index().value) == (0.0, 100.0, 100.0)
    assert n.moved(0.0).value == pytest.approx(0, abs=1e-6)
    assert n.moved(1.0).value > 10
    assert "finds needles near the end better" in needle_record.verdict(n)
    everywhere = needle.measure_statements("oracle", Oracle(g.facts, 10_000), g, decode, [700], depths)
    assert everywhere.accuracy(list(everywhere.cells)).value == 100
    never = needle.measure_statements("oracle", Oracle(g.facts, 1), g, decode, [700], depths)
    assert "does not answer by the text" in needle_record.verdict(never)


@pytest.mark.parametrize("mixer", ["mamba", "attention", "rwkv4", "griffin"])
def test_shared_prefixes_batches_and_pieces_change_nothing(mixer, monkeypatch):
    g, model = grid(), small(mixer)
    one = needle.measure_statements("m", model, g, decode, [700], [0.0, 0.5, 1.0], batch_size=3)
    monkeypatch.setattr(reader, "PIECE", 100)
    two = needle.measure_statements("m", model, g, decode, [700], [0.0, 0.5, 1.0], batch_size=1)
    for key, scores in one.cells.items():
        assert torch.allclose(torch.tensor(scores.margin), torch.tensor(two.cells[key].margin), atol=2e-4), key
        whole = torch.cat([g.haystack.ids[: g.cell(*key).prefix].expand(3, -1), g.cell(*key).rows], 1)
        for i, (a, b) in enumerate(g.answers):
            direct = log_probability(model, whole[i], a) - log_probability(model, whole[i], b)
            assert scores.margin[i] == pytest.approx(direct, abs=2e-4), key


@torch.no_grad()
def log_probability(model, prompt, answer):
    tokens = torch.cat([prompt, torch.tensor(answer)])[None]
    logits = model(input_ids=tokens).logits.log_softmax(-1)
    return float(sum(logits[0, len(prompt) - 1 + i, a] for i, a in enumerate(answer)))


def test_a_model_of_transformers_is_measured_the_same_way():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=720, **sizes)).eval()
    g = grid()
    n = needle.measure_statements("llama", model, g, decode, [700], [0.0, 0.5])
    whole = torch.cat([g.haystack.ids[: g.cell(700, 0.5).prefix].expand(3, -1), g.cell(700, 0.5).rows], 1)
    for i, (a, b) in enumerate(g.answers):
        direct = log_probability(model, whole[i], a) - log_probability(model, whole[i], b)
        assert n.cells[700, 0.5].margin[i] == pytest.approx(direct, abs=2e-4)
    with pytest.raises(UserError, match=r"at most 720 .* --lengths of at most 711"):  # the answer needs places too
        needle.measure_statements("llama", model, g, decode, [713], [0.0])


def test_generation_is_greedy_and_leaves_the_state_of_the_prompt():
    model, prompt = small(), torch.arange(40)[None]
    r = reader.Reader(model)
    logits, cache = r.read(prompt)
    forked = r.fork(cache, 2)
    assert r.generate(logits.repeat(2, 1), forked, 6)[0] == model.generate(prompt, max_new_tokens=6)[0, 40:].tolist()
    again, _ = r.read(torch.tensor([[5]]), cache)
    fresh, _ = r.read(torch.cat([prompt, torch.tensor([[5]])], 1))
    assert torch.allclose(again, fresh, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "answer", "where"),
    [("Madrid.", "Madrid", 0), ("in madrid", "Madrid", 3), ("Madrids", "Madrid", -1), ("Romeo Rome", "Rome", 6), ("O", "O", 0), ("No", "O", -1),
     ("as he said", "He", -1)],
)  # fmt: skip
def test_answers_are_found_as_words(said, answer, where):
    assert needle.names(said, answer) == where


def test_the_synthetic_needle_is_scored_by_the_most_probable_token():
    stream = NeedleStream(NeedleConfig(vocab_size=20, keys=4, lengths=(16,)))

    class Knows(nn.Module):
        """Finds the value if it is among the last `reach` tokens."""

        def __init__(self, reach):
            super().__init__()
            self.reach, self.weight = reach, nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, past_key_values=None, **_):
            logits = torch.zeros(*input_ids.shape, 20)
            for i, row in enumerate(input_ids[:, -self.reach :]):
                value = row[(row >= 4) & (row < 8)]
                logits[i, -1, value if len(value) else 19] = 1.0
            return Output(logits, None)

    n = needle.measure_synthetic("knows", Knows(10), stream, [16, 32], [0.0, 0.5, 1.0], prompts=10)
    assert [sum(n.cells[16, d].right) for d in (0.0, 0.5, 1.0)] == [0, 10, 10]
    assert [sum(n.cells[32, d].right) for d in (0.0, 0.5, 1.0)] == [0, 0, 10]
    record = needle_record.record([n], synthetic=True, config={}, seeds=[0], notes=[], chance=25, trained=16)
    assert record.verdict[1:] == [
        "Of needles in texts no longer than those of training (16 tokens) knows 66.7 % are found."
    ]
    assert record.maps[0].panels[0].values == [[0, 100, 100], [0, 0, 100]]
    assert record.figures[0].series[0].y == [0, 50, 100]
    assert record.complete


COMMON = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OTHERS = {
    "Jamba": {"intermediate_size": 64, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2, "num_experts_per_tok": 1,
              "attn_layer_period": 2, "attn_layer_offset": 1, "pad_token_id": None},
    "FalconH1": {"intermediate_size": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1},
    "Lfm2": {"intermediate_size": 64, "full_attn_idxs": [1, 3]},
    "Mamba": {"hidden_act": "gelu", "pad_token_id": None},  # its state is not called past_key_values
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_any_state_of_transformers_is_carried_and_forked_or_not_used(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON | OTHERS[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    r, tokens = reader.Reader(model), torch.randint(256, (2, 40))
    tokens[1, :25] = tokens[0, :25]
    assert r.carries == (family != "Mamba")
    _, state = r.read(tokens[:1, :25])
    got, end = r.read(tokens[:, 25:], r.fork(state, 2))
    want = model(input_ids=tokens, use_cache=False).logits[:, -1]
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    answers = [[5, 6, 7], [8]]
    scores = r.log_probability(got, end, answers)
    assert scores == pytest.approx(
        [log_probability(model, t, a) for t, a in zip(tokens, answers, strict=True)], abs=1e-3
    )
    said = r.generate(got, end, 3)[0]
    assert said[0] == int(want[0].argmax())


def test_a_model_that_goes_wrong_in_pieces_is_read_whole():
    class Forgets(LlamaForCausalLM):
        """Begins anew at every call of more than one token."""

        def forward(self, input_ids=None, past_key_values=None, **options):
            return super().forward(
                input_ids=input_ids, past_key_values=past_key_values if input_ids.shape[1] == 1 else None, **options
            )

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Forgets(LlamaConfig(vocab_size=256, **sizes)).eval()
    r = reader.Reader(model)
    assert not r.carries
    assert not model.training
    tokens = torch.randint(256, (2, 30))
    _, state = r.read(tokens[:, :20])
    got, _ = r.read(tokens[:, 20:], state)
    assert torch.allclose(got, model(input_ids=tokens, use_cache=False).logits[:, -1], atol=1e-5)


def test_a_model_that_reads_everything_again_is_named_on_the_page():
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**COMMON | OTHERS["Mamba"])).eval()
    g = grid(FACTS[:2])
    found = [needle.measure_statements(n, m, g, decode, [500], [0.0, 0.5, 1.0]) for n, m in (("slow", model), ("own", small()))]  # fmt: skip
    assert [n.carries for n in found] == [False, True]
    (note,) = needle_record.slow(found)
    assert "slow cannot go on from its own state" in note


def test_statements_of_one_kind_are_not_independent():
    """Kinds that agree within and differ between give the error of so many kinds; kinds that do not matter that of the statements."""
    kinds = [k for k in "abcdef" for _ in range(8)]
    alike = needle.clustered([float(k in "abc") for k in kinds], kinds)
    assert (alike.value, alike.n) == (0.5, 6)
    assert alike.stderr == pytest.approx(Value.mean([1, 1, 1, 0, 0, 0]).stderr)
    assert alike.interval()[0] < 0  # three kinds of six: no certainty
    mixed = needle.clustered([float(i % 2) for i in range(48)], kinds)
    assert mixed.stderr == Value.mean([float(i % 2) for i in range(48)]).stderr
    assert mixed.n == 6
    assert needle.clustered([0.0, 1.0], ["a", "a"]) == needle.clustered([0.0, 1.0], []) == Value.mean([0, 1])


def test_intervals_cover_the_truth_when_kinds_differ():
    draw = random.Random(0)
    covered = 0
    for _ in range(300):
        samples, kinds = [], []
        for kind in range(8):
            p = draw.choice([0.1, 0.9])
            samples += [float(draw.random() < p) for _ in range(6)]
            kinds += [str(kind)] * 6
        low, high = needle.clustered(samples, kinds).interval()
        covered += low <= 0.5 <= high
    assert 0.9 <= covered / 300 <= 0.99  # of 95 %; with the statements' own errors it is 60 %


def test_the_page_says_over_what_its_errors_are():
    g = grid((FACTS[0], FACTS[-1]))
    n = needle.measure_statements("m", small(), g, decode, [500], [0.0, 0.5, 1.0])
    record = needle_record.record([n], synthetic=False, config={}, seeds=[], notes=[])
    assert n.accuracy(list(n.cells)).n == 2
    for part in (record.tables[0], record.figures[0], record.figures[-1]):
        assert "over the 2 kinds of statements" in part.method


def test_a_model_that_answers_nan_is_named():
    model = small()
    model.lm_head.weight.data *= math.nan
    with pytest.raises(UserError, match="broken answers with NaN"):
        needle.measure_statements("broken", model, grid(), decode, [700], [0.0])


def test_fingerprints_tell_the_order_of_weights_apart():
    model = small()
    before = fingerprint(model)
    weight = model.backbone.embedding.weight
    weight.data = weight.data.flip(0)
    assert fingerprint(model) != before


def test_finished_cells_are_kept_and_not_measured_again(tmp_path):
    g, model, read = grid(), small(), []
    identity = {"model": fingerprint(model)}
    store = needle.Store(tmp_path / "cells.json", identity)
    part = needle.measure_statements("m", model, g, decode, [700], [0.0, 0.5], store=store)
    store = needle.Store(tmp_path / "cells.json", identity, resume=True)
    whole = needle.measure_statements("m", model, g, decode, [700], [0.0, 0.5, 1.0], store=store, advance=read.append)
    assert {k: whole.cells[k] for k in part.cells} == part.cells
    assert sum(read) == g.cell(700, 1.0).prefix + g.cell(700, 1.0).rows.numel()
    with pytest.raises(UserError, match="--resume"):
        needle.Store(tmp_path / "cells.json", identity)
    with pytest.raises(UserError, match="model differ"):
        needle.Store(tmp_path / "cells.json", {"model": "other"}, resume=True)
    (tmp_path / "cells.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        needle.Store(tmp_path / "cells.json", identity, resume=True)


def test_the_command_line_measures_several_models_on_one_page(tmp_path):
    for name, mixer in (("a", "mamba"), ("b", "gla")):
        small(mixer).save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    arguments = [
        "needle",
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "--lengths",
        "450",
        "--depths",
        "3",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    tree = json.loads((out / "results.json").read_text())
    assert tree["complete"]
    assert [p["name"] for p in tree["maps"][0]["panels"]] == ["a", "b"]
    assert len(tree["verdict"]) == 2
    assert "By length and depth" in (out / "report.html").read_text()


def test_a_model_trained_on_the_synthetic_needle_is_recognised(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[model]\nvocab_size = 20\nd_model = 8\nn_layers = 1\n[data]\ntask = "needle"\nvocab_size = 20\nkeys = 4\nlengths = [8, 16]\n'
        "batch_size = 4\n[training]\nsteps = 3\nlr = 1e-3\n"
    )
    assert CliRunner().invoke(app, ["train", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run")]).exit_code == 0
    arguments = [
        "needle",
        str(tmp_path / "run" / "model"),
        "--depths",
        "3",
        "--prompts",
        "8",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    tree = json.loads(result.stdout)
    assert tree["config"]["lengths"] == [8, 16, 32, 64]
    assert any("longer than any in training" in note for note in tree["notes"])


def test_killed_in_the_middle_and_resumed_it_ends_as_if_nothing_had_been(tmp_path):
    small().save_pretrained(tmp_path / "m")
    arguments = ["needle", tmp_path / "m", "--lengths", "450,900", "--depths", 3, "--device", "cpu"]

    def command(out, *more):
        return [str(a) for a in (*arguments, "--out", tmp_path / out, *more)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert CliRunner().invoke(app, command("whole")).exit_code == 0
        process = subprocess.Popen(
            [sys.executable, "-m", "ssmlens", *command("cut")], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        cells, end = tmp_path / "cut" / "cells.json", time.monotonic() + 120
        while not (cells.exists() and len(json.loads(cells.read_text())["cells"]) >= 2):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < end
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kept = json.loads(cells.read_text())["cells"]
        assert 2 <= len(kept) < 8
        assert not (tmp_path / "cut" / "results.json").exists()
        again = CliRunner().invoke(app, command("cut"))
        assert "--resume" in str(again.exception)
        assert CliRunner().invoke(app, command("cut", "--resume")).exit_code == 0
    finally:
        torch.set_num_threads(threads)
    whole, cut = (json.loads((tmp_path / d / "results.json").read_text()) for d in ("whole", "cut"))
    assert {k: v for k, v in whole.items() if k != "provenance"} == {k: v for k, v in cut.items() if k != "provenance"}
    assert kept.items() <= json.loads(cells.read_text())["cells"].items()


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu", "unknown device 'tpu'"), ("cuda", "no cuda that PyTorch can use"), ("mps", "no mps"), ("cuda:x", "unknown device")],
)  # fmt: skip
def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    small().save_pretrained(tmp_path / "m")
    result = CliRunner().invoke(app, ["needle", str(tmp_path / "m"), "--device", device, "--out", str(tmp_path / "o")])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_what_is_no_language_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ssmlens.models.pretrained.load", lambda path: nn.Linear(2, 2))
    result = CliRunner().invoke(app, ["needle", "mamba-default", "--out", str(tmp_path)])
    assert "mamba-default is a Linear: only a language model" in str(result.exception)


def test_devices_are_chosen_by_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [devices.chosen(d) for d in ("auto", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    with pytest.raises(UserError, match=r"no cuda:2: this machine has 2 GPU"):
        devices.chosen("cuda:2")


def test_prompts_follow_the_model_to_its_device():
    """A device without numbers stands for one that is not here: what is read, forked and carried must all lie there."""
    r = reader.Reader(small().to("meta"))
    logits, state = r.read(torch.arange(20)[None])
    more, _ = r.read(torch.arange(6).reshape(2, 3), r.fork(state, 2))
    assert (logits.device.type, more.device.type, tuple(more.shape)) == ("meta", "meta", (2, 256))
