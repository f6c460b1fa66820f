"""The flat vector: order, round trip, views and the layout's fingerprint."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from narses import flat
from narses.errors import ConfigError, InputError
from narses.models import make


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def test_order_is_that_of_the_parameters_row_major() -> None:
    module = _net()
    expected = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    assert flat.count(module) == len(expected) == 3 * 8 + 3 + 6 + 52  # buffers of BatchNorm are not in it
    assert torch.equal(flat.flatten(module), expected)


def test_memory_format_does_not_change_the_vector() -> None:
    module = _net()
    before = flat.flatten(module)
    assert torch.equal(flat.flatten(module.to(memory_format=torch.channels_last)), before)
    other = _net().to(memory_format=torch.channels_last)
    flat.write(before, other)
    assert torch.equal(flat.flatten(other), before)
    assert torch.equal(other(torch.ones(2, 2, 3, 3)), module(torch.ones(2, 2, 3, 3)))


def test_flatten_is_fresh_memory_and_write_copies() -> None:
    module = _net()
    vector = flat.flatten(module)
    vector.fill_(7)
    assert not (flat.flatten(module) == 7).any()
    flat.write(vector, module)
    vector.zero_()
    assert (flat.flatten(module) == 7).all()
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_views_write_into_the_row_of_a_matrix() -> None:
    module = _net()
    matrix = torch.zeros(3, flat.count(module) + 5)
    row = matrix[1, : flat.count(module)]
    for k, (view, parameter) in enumerate(zip(flat.views(row, module), module.parameters(), strict=True)):
        assert view.shape == parameter.shape
        view.fill_(k + 1)
    assert (row > 0).all()
    assert matrix.sum() == row.sum()


@pytest.mark.parametrize("vector", [torch.zeros(3), torch.zeros(86), torch.zeros(1, 85), torch.zeros(170)[::2]])
def test_a_vector_of_another_shape_is_refused(vector: torch.Tensor) -> None:
    with pytest.raises(InputError, match="expected one vector of 85 values"):
        flat.write(vector, _net())


def test_only_float32_parameters() -> None:
    with pytest.raises(ConfigError, match=r"parameter 0\.weight is torch\.float64"):
        flat.count(_net().double())


def test_layout_hash_is_sha256_of_names_and_shapes() -> None:
    expected = hashlib.sha256(b'[["output.weight",[10,64]],["output.bias",[10]]]').digest()
    assert flat.layout_hash(make("softmax").build((64,), 10, 0)) == expected


def test_layout_hash_tells_names_shapes_and_order_apart_but_not_values() -> None:
    def chain(*layers: tuple[str, nn.Module]) -> bytes:
        module = nn.Module()
        for name, layer in layers:
            module.add_module(name, layer)
        return flat.layout_hash(module)

    one, two = nn.Linear(2, 3), nn.Linear(3, 2)
    hashes = {
        chain(("a", one), ("b", two)),
        chain(("b", one), ("a", two)),
        chain(("a", two), ("b", one)),
        chain(("b", two), ("a", one)),
        chain(("a", nn.Linear(3, 2, bias=False)), ("b", two)),
    }
    assert len(hashes) == 5
    assert chain(("a", nn.Linear(2, 3)), ("b", nn.Linear(3, 2))) == chain(("a", one), ("b", two))
