"""`ssmlens polarize` and `ssmlens train --from`, as a user types them."""

import json

import pytest
import torch
from typer.testing import CliRunner

import ssmlens
from ssmlens.cli.app import app
from ssmlens.errors import UserError
from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.models.retrofit import new_entries

TUNING = """
[data]
task = "corpus"
length = 64
batch_size = 2
validation_windows = 2

[training]
steps = 3
lr = 1e-2
weight_decay = 0.1
checkpoint_every = 1
"""


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(vocab_size=256, d_model=16, n_layers=2))
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "data.json").write_text("{}")
    (tmp_path / "tune.toml").write_text(TUNING)
    return tmp_path / "plain"


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def fails(*arguments):
    result = call(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, UserError), result.exception
    return str(result.exception)


def test_polarize_train_only_the_new_and_load_back(plain, tmp_path):
    result = call("polarize", plain, "-o", tmp_path / "new", "--ones", 2)
    assert result.exit_code == 0, result.output
    tree = json.loads((tmp_path / "new" / "results.json").read_text())
    assert tree["tables"][0]["rows"][0][3] == 2 * 2 * 3 * 32  # layers, rows of B and C, three channels, d_inner
    assert (tmp_path / "new" / "data.json").exists()
    start = ssmlens.load(tmp_path / "new")
    result = call(
        "train", tmp_path / "tune.toml", "--from", tmp_path / "new", "--only-polarized", "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    tuned = ssmlens.load(tmp_path / "run" / "model")
    entries = new_entries(start)
    for name, value in tuned.state_dict().items():
        changed = value != start.state_dict()[name]
        assert not (changed & ~entries.get(name, torch.zeros_like(changed))).any(), name
    name = "backbone.blocks.0.mixer.x_proj.weight"
    assert (tuned.state_dict()[name] != start.state_dict()[name])[entries[name]].any()


def test_all_parameters_are_trained_without_the_option_and_a_resume_needs_the_same_start(plain, tmp_path):
    call("polarize", plain, "-o", tmp_path / "new")
    run = ["train", tmp_path / "tune.toml", "--from", tmp_path / "new", "--out", tmp_path / "run"]
    assert call(*run).exit_code == 0
    tuned, start = ssmlens.load(tmp_path / "run" / "model"), ssmlens.load(tmp_path / "new")
    assert not torch.equal(tuned.backbone.embedding.weight, start.backbone.embedding.weight)
    assert call(*run, "--resume").exit_code == 0
    run[3] = plain
    assert "another configuration" in fails(*run, "--resume")
    assert "only_polarized" in fails("train", *run[1:3], tmp_path / "new", *run[4:], "--only-polarized", "--resume")


def test_several_models_lie_below_the_directory_and_share_a_page(plain, tmp_path):
    torch.manual_seed(1)
    LanguageModel(LanguageModelConfig(vocab_size=256, d_model=16, n_layers=1, mixer="gla")).save_pretrained(
        tmp_path / "b"
    )
    assert call("polarize", plain, tmp_path / "b", "-o", tmp_path / "new").exit_code == 0
    tree = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [row[0] for row in tree["tables"][0]["rows"]] == ["plain", "b"]
    for name in ("plain", "b"):
        assert ssmlens.load(tmp_path / "new" / name).config.architecture.polarization is not None


def test_one_model_that_is_refused_leaves_nothing_of_the_others(plain, tmp_path):
    attention = LanguageModel(LanguageModelConfig(vocab_size=256, d_model=16, n_layers=1, mixer="attention"))
    attention.save_pretrained(tmp_path / "att")
    assert "nothing to polarize" in fails("polarize", plain, tmp_path / "att", "-o", tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())
    assert call("polarize", plain, plain, "-o", tmp_path / "new").exit_code == 0
    page = (tmp_path / "new" / "report.html").read_text()
    assert "plain (2)" in page
    assert "change of logits" in page


def test_bad_requests_are_named(plain, tmp_path):
    LanguageModel(LanguageModelConfig(vocab_size=256, d_model=16, n_layers=1, mixer="attention")).save_pretrained(
        tmp_path / "att"
    )
    assert "nothing to add" in fails("polarize", plain, "-o", tmp_path / "x", "--ones", 0, "--zeros", 0)
    assert "nothing to polarize" in fails("polarize", tmp_path / "att", "-o", tmp_path / "x")
    assert "there already and not empty" in fails("polarize", plain, "-o", plain)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "not empty" in fails("polarize", plain, "-o", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    tune = tmp_path / "tune.toml"
    assert "neither" in fails("train", tune, "--out", tmp_path / "x")
    assert "not polarized" in fails("train", tune, "--from", plain, "--only-polarized", "--out", tmp_path / "x")
    (tmp_path / "both.toml").write_text("[model]\nd_model = 8\n" + TUNING)
    assert "not both" in fails("train", tmp_path / "both.toml", "--from", plain, "--out", tmp_path / "x")
    assert "--from" in fails("train", tmp_path / "both.toml", "--only-polarized", "--out", tmp_path / "x")


def with_tokenizer(directory):
    """A small Mamba of transformers whose 900 tokens are of a tokenizer that puts <s> before a text and a space before a word."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    from ssmlens.tasks import corpus

    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    letters = [chr(i) for i in range(32, 127)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>"], initial_alphabet=letters, show_progress=False)
    t.train_from_iterator([bytes(corpus.python_reference().heldout).decode()], trainer)
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>").save_pretrained(directory)
    config = transformers.MambaConfig(
        vocab_size=900, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=None
    )
    transformers.MambaForCausalLM(config).save_pretrained(directory)


def test_a_tokenizer_stays_with_its_model_and_text_is_read_by_it(tmp_path):
    from ssmlens.models.pretrained import tokens

    with_tokenizer(tmp_path / "hf")
    (tmp_path / "tune.toml").write_text(TUNING)
    assert call("polarize", tmp_path / "hf", "-o", tmp_path / "new").exit_code == 0
    run = call(
        "train", tmp_path / "tune.toml", "--from", tmp_path / "new", "--only-polarized", "--out", tmp_path / "run"
    )
    assert run.exit_code == 0, run.output
    model = ssmlens.load(tmp_path / "run" / "model")
    coder = tokens.coder(tokens.tokenizer("m", model, str(tmp_path / "run" / "model")))
    assert coder.start == [0]
    assert coder.decode(coder.encode("The statement is")) == "The statement is"
    out = ["--lengths", 450, "--depths", 3, "--out", tmp_path / "needle"]
    assert call("needle", tmp_path / "run" / "model", *out).exit_code == 0
    for file in (tmp_path / "new").glob("tokenizer*"):
        file.unlink()
    for verb in (
        ["needle", tmp_path / "new", *out[:-1], tmp_path / "n"],
        ["train", tmp_path / "tune.toml", "--from", tmp_path / "new"],
    ):
        assert "has no tokenizer, and its 900 tokens are not bytes" in fails(*verb)


def test_text_in_tokens_is_cut_as_bytes_are():
    from ssmlens.tasks.corpus import CorpusConfig
    from ssmlens.tasks.tokens import TokenStream

    stream = TokenStream(
        CorpusConfig(length=32, batch_size=2), lambda text: [len(word) + 300 for word in text.split()], 1000
    )
    batch = stream.batch(0)
    assert batch.tokens.shape == (2, 32)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert int(batch.tokens.min()) > 300
    assert torch.equal(stream.batch(3).tokens, stream.batch(3).tokens)
    with pytest.raises(UserError, match="tokens to train on"):
        TokenStream(CorpusConfig(length=64, batch_size=2), lambda text: [len(text)], 10**9)


def test_of_two_processes_one_saves_and_the_old_entries_stay(plain, tmp_path):
    import os
    import socket
    import subprocess
    import sys

    call("polarize", plain, "-o", tmp_path / "new")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    arguments = [
        "train",
        tmp_path / "tune.toml",
        "--from",
        tmp_path / "new",
        "--only-polarized",
        "--out",
        tmp_path / "run",
    ]
    two = [
        subprocess.Popen(
            [sys.executable, "-m", "ssmlens", *map(str, arguments)], env={**os.environ, **shared, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [p.communicate(timeout=120)[0] for p in two]
    assert [p.returncode for p in two] == [0, 0], said
    tuned, start = ssmlens.load(tmp_path / "run" / "model"), ssmlens.load(tmp_path / "new")
    entries = new_entries(start)
    for name, value in tuned.state_dict().items():
        changed = value != start.state_dict()[name]
        assert not (changed & ~entries.get(name, torch.zeros_like(changed))).any(), name
    assert not torch.equal(*(m.backbone.blocks[0].mixer.x_proj.weight for m in (tuned, start)))
