"""Which parameters decay."""

import math

import pytest
import torch
from torch import nn

from pnorm_decay import AdamPWD, param_groups
from pnorm_decay.optim import split_decayed


def network() -> nn.Module:
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.Conv1d(4, 4, 1), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
    )
    model[3].weight = model[0].weight  # tied
    model.append(nn.Linear(2, 2)).append(nn.PReLU())
    model[4].weight.requires_grad_(False)
    return model


def test_matrices_decay_and_the_rest_does_not() -> None:
    decayed, undecayed = split_decayed(network())
    assert [name for name, _ in decayed] == ["0.weight", "1.weight"]
    names = ["1.bias", "2.weight", "2.bias", "4.weight", "4.bias", "5.weight"]
    assert [name for name, _ in undecayed] == names


def test_the_groups_have_every_parameter_once() -> None:
    model = network()
    decayed, undecayed = groups = param_groups(model, p=0.5, lambda_p=0.25)
    assert {name: decayed[name] for name in ("p", "lambda_p")} == {"p": 0.5, "lambda_p": 0.25}
    assert {name: undecayed[name] for name in ("p", "lambda_p")} == {"p": 0.5, "lambda_p": 0.0}
    listed = [id(param) for group in groups for param in group["params"]]
    assert sorted(listed) == sorted(map(id, model.parameters()))
    assert [group["names"] for group in groups] == [
        [name for name, _ in part] for part in split_decayed(model)
    ]


def test_a_step_decays_only_the_decayed_group() -> None:
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    groups = param_groups(model, p=1, lambda_p=0.5)
    optimizer = AdamPWD(groups, lr=1.0, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert model.bias.tolist() == [1.0, 1.0]


def test_the_undecayed_group_takes_no_decay_of_whatever_kind_from_the_optimizer() -> None:
    decayed, undecayed = AdamPWD(
        param_groups(network(), p=1, lambda_p=0.5), weight_decay=0.5, hold_zeros=True
    ).param_groups
    own = {"lambda_p": 0.0, "weight_decay": 0.0, "hold_zeros": False}
    assert {name: undecayed[name] for name in own} == own
    assert (decayed["weight_decay"], decayed["hold_zeros"]) == (0.5, True)


@pytest.mark.parametrize(("p", "number"), [(1.9, 1), (2.0, 2), (3.0, 2)])
def test_what_is_zero_is_excluded_where_it_could_never_move(p: float, number: int) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    decayed, undecayed = param_groups(model, p=p, lambda_p=1.0, zero_init="exclude")
    assert (len(decayed["params"]), len(undecayed["params"])) == (number, 2 - number)


def test_a_model_without_biases_gives_an_empty_group() -> None:
    groups = param_groups(nn.Linear(2, 2, bias=False), p=1, lambda_p=1.0)
    assert [len(group["params"]) for group in groups] == [1, 0]
    AdamPWD(groups).step()


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="Invalid zero_init: 'include'"):
        param_groups(network(), p=1, lambda_p=1, zero_init="include")
    with pytest.raises(ValueError, match="Invalid lambda_p: nan"):
        AdamPWD(param_groups(network(), p=1, lambda_p=math.nan))


@pytest.mark.parametrize("given", [[nn.Linear(2, 2)], nn.Linear(2, 2).parameters(), "model"])
def test_what_is_no_model_is_said(given: object) -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, not a (list|generator|str)"):
        param_groups(given, p=0.8, lambda_p=0.1)


@pytest.mark.parametrize(("p", "lambda_p"), [("0.8", 0.1), (0.8, "1"), (0, 0.1), (0.8, -1)])
@pytest.mark.parametrize("zero_init", ["decay", "exclude"])
def test_bad_values_are_said_before_there_is_an_optimizer(p, lambda_p, zero_init) -> None:
    with pytest.raises(ValueError, match=r"Invalid (p|lambda_p): "):
        param_groups(nn.Linear(2, 2), p=p, lambda_p=lambda_p, zero_init=zero_init)
