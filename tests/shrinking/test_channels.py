import torch

from granet.shrinking.channels import Channels, Units

NAN = float("nan")


def values(channels):
    return [None if value != value else value for value in channels.values.tolist()]


def test_units_are_joined_and_kept():
    units = Units()
    first, second, third = units.new(2), units.new(2), units.new(1)
    units.join(first, second)
    units.join(second[1:], third)
    units.pin(first[1:])
    roots = units.roots()
    assert roots[first].tolist() == roots[second].tolist() and roots[0] != roots[1]
    assert roots[third] == roots[1]
    assert units.pinned()[roots].tolist() == [False, True, False, True, True]


def test_what_is_known_of_values():
    channels = Channels(1, torch.tensor([0, 1, 2]), torch.tensor([0.0, 2.0, NAN], dtype=torch.float64))
    assert values(channels.with_values(torch.tensor([1.0, 1.0, 1.0]))) == [1, 1, None]
    assert values(channels.zeros_only()) == [0, None, None]
    other = channels.with_values(torch.tensor([0.0, 3.0, 0.0]))
    assert values(channels.agreeing_with(other)) == [0, None, None]
    twice = channels.repeated(2)
    assert twice.ids.tolist() == [0, 0, 1, 1, 2, 2] and values(twice) == [0, 0, 2, 2, None, None]
    assert channels.at(3).axis == 3 and len(twice) == 6
