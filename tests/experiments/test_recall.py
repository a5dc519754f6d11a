"""What is trained for Tables 2 and 5 below the paper's scale, and how recall is counted."""

import pytest
import torch

from ssmlens.experiments import recall
from ssmlens.models.language_model import LanguageModelOutput


def test_a_longer_sequence_keeps_its_pairs_longer():
    scale = recall.sized(recall.SCALES["laptop"], 256)
    assert scale.lengths == (8, 16, 32, 64, 128, 256)
    task = recall.data(scale, recall.VARIANTS["corrected"], 0)
    assert [(t.length, t.pairs) for t in task.test] == [(256, 4), (256, 8), (256, 16)]
    assert {t.pairs for t in task.train if t.length == 128} == {4, 8, 16}
    assert {t.pairs for t in task.train if t.length == 16} == {1, 2, 4}
    assert recall.half_life(scale, recall.VARIANTS["rescaled"]) == pytest.approx(693.1 / 4, rel=1e-3)
    assert recall.half_life(scale, recall.VARIANTS["released"]) == pytest.approx(1.0)


def test_the_laptop_mix_has_about_the_shares_of_the_released_one():
    def shares(segments):
        whole = sum(s.examples for s in segments)
        lengths = sorted({s.length for s in segments})
        return [sum(s.examples for s in segments if s.length == n) / whole for n in lengths]

    task = recall.data(recall.SCALES["laptop"], recall.VARIANTS["released"], 0)
    assert shares(task.train) == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.01)
    assert shares(recall.mqar.released_mix()) == pytest.approx([1 / 3, 1 / 15, 0.2, 0.2, 0.2])
    first = recall.finding_data(recall.SCALES["laptop"], 0)
    assert (
        [(s.length, s.pairs) for s in first.train]
        == [(8, 2), (16, 2), (16, 4)]
        == [(s.length, s.pairs) for s in first.test]
    )
    assert first.seed != task.seed
    assert not recall.SCALES["paper"].finding


def test_what_is_recalled_is_counted_by_distance():
    scale = recall.SCALES["smoke"]
    stream = recall.mqar.MqarStream(recall.data(scale, recall.VARIANTS["corrected"], 0))

    class Near(torch.nn.Module):
        """Right where the value was told fewer than 6 tokens ago."""

        def __init__(self):
            super().__init__()
            self.parameter = torch.nn.Parameter(torch.zeros(()))

        def forward(self, tokens, targets):
            answers = []
            for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
                for at, target in enumerate(wanted):
                    if target >= 0:
                        distance = at - row.index(row[at]) - 1
                        answers.append(target if distance < 6 else 0)
            return LanguageModelOutput(logits=torch.nn.functional.one_hot(torch.tensor(answers), 64).float())

    found = recall.recalled(Near(), stream.test())
    assert sorted(found) == list(scale.pairs)
    for pairs, of in found.items():
        assert sum(n for _, n in of.values()) == pairs * scale.test_examples
        assert all(right == (n if edge < 6 else 0) for edge, (right, n) in of.items())
        assert set(of) <= {1, 2, 3, 4, 6, 8, 12, 16, 24}
    by_pairs = recall.accuracy(found)
    assert by_pairs[2] == sum(r for r, _ in found[2].values()) / (2 * scale.test_examples)
    assert 0 < by_pairs[8] < 1
