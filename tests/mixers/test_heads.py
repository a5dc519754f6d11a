import torch

from ssmlens.mixers import heads


def test_positions_of_padded_packed_and_continued_sequences():
    x = torch.zeros(2, 6, 1)
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    reset = torch.tensor([[False] * 6, [False, False, True, False, True, False]])

    def at(start, mask, reset):
        at, following = heads.positions(x, start, mask, reset)
        return at.tolist(), following.tolist()

    assert at(None, None, None) == ([[0, 1, 2, 3, 4, 5]] * 2, [6, 6])
    assert at(None, mask, None) == ([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]], [4, 6])
    assert at(None, None, reset) == ([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1]], [6, 2])
    assert at(torch.tensor([7, 9]), None, reset) == ([[7, 8, 9, 10, 11, 12], [9, 10, 0, 1, 0, 1]], [13, 2])
    # a reset at padding counts too: the next token is the first
    reset = torch.tensor([[True, False, False, False, False, False], [False] * 5 + [True]])
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 5 + [False]])
    assert at(torch.tensor([7, 9]), mask, reset) == ([[0, 0, 0, 1, 2, 3], [9, 10, 11, 12, 13, 0]], [4, 0])


def test_angles_are_exact_far_from_the_beginning():
    cos, sin = heads.rotation(torch.tensor([[10_000_000]]), 4, 10000, 1)
    angle = 1e7 * 10000 ** (-torch.arange(4, dtype=torch.float64) / 3)
    torch.testing.assert_close(cos[0, 0, 0], angle.cos(), atol=1e-8, rtol=0)
    torch.testing.assert_close(sin[0, 0, 0], angle.sin(), atol=1e-8, rtol=0)
