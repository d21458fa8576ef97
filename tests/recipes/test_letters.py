"""Letters in matplotlib's fonts."""

import torch

from oneshot_fast.recipes.letters import PROMPTS, letters


def test_letters_have_their_colour_lie_inside_and_change_with_the_seed():
    drawn = letters(0, 64)
    assert drawn.images.shape == (64, 3, 64, 64) and drawn.prompts == PROMPTS
    assert torch.equal(drawn.labels, torch.arange(64) % len(PROMPTS))
    assert torch.equal(drawn.images, letters(0, 64).images)
    assert not torch.equal(drawn.images, letters(1, 64).images)
    ground = drawn.images[:, :, :1, :1]
    ink = (drawn.images - ground).abs().amax(1) > 0.2
    assert ink.any(2).any(1).all() and not ink[:, 0].any() and not ink[:, :, 0].any()
    channel = (drawn.images * ink[:, None]).sum((2, 3)).argmax(1)
    for k, prompt in enumerate(PROMPTS):
        if (name := prompt.split()[1]) != "yellow":
            assert channel[k] == ("red", "green", "blue").index(name)


def test_italics_are_large_and_of_the_same_prompts():
    drawn, usual = letters(0, 64, "italics"), letters(0, 64)
    assert drawn.prompts == PROMPTS and torch.equal(drawn.labels, usual.labels)
    heights = [
        (images.images[:, 1] < images.images[:, 1, :1, :1] - 0.1).any(2).sum(1)
        for images in (drawn, usual)
    ]
    assert heights[0].min() > heights[1].min() + 5


def test_centred_ones_are_in_the_middle():
    drawn = letters(0, 64, "centred").images
    ink = (drawn - drawn[:, :, :1, :1]).abs().amax(1) > 0.2
    for axis in (1, 2):
        there = ink.any(axis).float()
        first, last = there.argmax(1), 63 - there.flip(1).argmax(1)
        assert ((first + last) / 2 - 31.5).abs().max() < 3
