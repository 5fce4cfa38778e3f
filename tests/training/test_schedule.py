from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnorm_decay import AdamPWD
from pnorm_decay.training.schedule import DecaySchedule, TargetSchedule, WarmupCosine, warmup_cosine
from pnorm_decay.training.settings import ConfigError


@given(
    steps=st.integers(2, 1000),
    share=st.floats(0, 0.5),
    final=st.floats(0, 1),
)
def test_rises_then_falls_to_the_final_fraction(steps, share, final):
    warmup = int(share * steps)
    factors = [
        warmup_cosine(step, steps=steps, warmup=warmup, final_fraction=final)
        for step in range(steps)
    ]
    rise, fall = factors[:warmup], factors[warmup:]
    assert all(0 < factor < 1 for factor in rise)
    assert rise == sorted(rise)
    assert fall[0] == pytest.approx(1)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(fall))
    if len(fall) > 1:
        assert fall[-1] == pytest.approx(final)


def test_half_way_is_the_mean_of_both_ends():
    assert warmup_cosine(10, steps=21, warmup=0, final_fraction=0.1) == pytest.approx(0.55)


def test_attached_scheduler_sets_the_optimizers_lr():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupCosine(warmup_epochs=0.5, final_fraction=0.25).attach(optimizer, 12, 4)
    lrs = []
    for _ in range(12):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert lrs[:3] == pytest.approx([2 / 3, 4 / 3, 2])
    assert lrs[-1] == pytest.approx(0.5)
    middle = 0.25 + 0.75 * (1 + math.cos(math.pi * 4 / 9)) / 2
    assert lrs[6] == pytest.approx(2 * middle)


def test_warmup_takes_at_most_half_of_a_short_run():
    assert WarmupCosine(warmup_steps=100).warmup(10, None) == 5
    assert WarmupCosine(warmup_epochs=0.7).warmup(100, 11) == 8  # 7.7 rounded


def test_what_is_left_of_a_warmup_that_is_too_long_is_said():
    said = WarmupCosine(warmup_steps=100).shortened(10, None)
    assert said.startswith("schedule.warmup_steps=100: more than half of the run, which has 10")
    assert said.endswith("takes 5 of them, not 100")
    by_epochs = WarmupCosine(warmup_epochs=1.5).shortened(10, 4)
    assert by_epochs.startswith("schedule.warmup_epochs=1.5: ")
    assert by_epochs.endswith("takes 5 of them, not 6")
    assert WarmupCosine(warmup_steps=5).shortened(10, None) == ""
    assert WarmupCosine().shortened(10, None) == ""


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_steps": -1},
        {"warmup_epochs": -0.5},
        {"warmup_epochs": 1, "warmup_steps": 1},
        {"final_fraction": 1.5},
        {"final_fraction": -0.1},
    ],
)
def test_bad_values(options):
    with pytest.raises(ConfigError, match="schedule"):
        WarmupCosine.checked(options, "schedule")


def test_epochs_need_data_with_epochs():
    with pytest.raises(ConfigError, match="warmup_steps"):
        WarmupCosine(warmup_epochs=1).warmup(100, None)


def test_decay_schedule_leads_to_the_given_value_and_leaves_the_undecayed_alone():
    decayed, undecayed = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = AdamPWD(
        [{"params": [decayed]}, {"params": [undecayed], "lambda_p": 0.0}], p=0.5, lambda_p=0.4
    )
    schedule = DecaySchedule(option="lambda_p", start=0.0, begin=0.25, end=0.75)
    (scheduler,) = schedule.attach(optimizer, 8)
    values = []
    for _ in range(8):
        values.append([group["lambda_p"] for group in optimizer.param_groups])
        scheduler.step()
    assert [value for value, _ in values] == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert all(other == 0 for _, other in values)
    assert DecaySchedule(option=None).attach(optimizer, 8) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"option": "p", "start": 0.0}, "start=0"),
        ({"option": "lambda_p", "start": -1.0}, "start=-1"),
        ({"option": "p", "start": 2.0, "begin": 0.5, "end": 0.5}, "end=0.5"),
        ({"option": "p", "start": 2.0, "begin": -0.1}, "begin=-0.1"),
    ],
)
def test_bad_decay_schedules(options, named):
    with pytest.raises(ConfigError, match=named):
        DecaySchedule.checked(options, "decay_schedule")


def test_an_optimizer_without_the_option():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ConfigError, match="no such option"):
        DecaySchedule(option="p", start=2.0).attach(optimizer, 10)


def test_a_group_without_decay_has_none_on_the_way_to_the_others_value():
    decayed, undecayed = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = AdamPWD(
        [{"params": [decayed]}, {"params": [undecayed], "lambda_p": 0.0}], p=0.5, lambda_p=0.4
    )
    (scheduler,) = DecaySchedule(option="lambda_p", start=0.9).attach(optimizer, 10)
    for _ in range(10):
        assert optimizer.param_groups[0]["lambda_p"] > 0
        assert optimizer.param_groups[1]["lambda_p"] == 0
        scheduler.step()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sparsity": 1.0}, "decay_schedule.sparsity=1"),
        ({"sparsity": 0.9, "begin": 1.0}, "decay_schedule.begin=1"),
        ({"sparsity": 0.9, "begin": 0.5, "end": 0.4}, "decay_schedule.end=0.4"),
    ],
)
def test_bad_target_schedules(options, named):
    with pytest.raises(ConfigError, match=named):
        TargetSchedule.checked(options, "decay_schedule")


def test_a_target_is_steered_to_between_the_fractions_of_the_run():
    optimizer = AdamPWD([torch.nn.Parameter(torch.ones(2, 2))], p=0.5, lambda_p=1.0)
    schedule = TargetSchedule(sparsity=0.9, begin=0.25, end=0.75)
    (target,) = schedule.attach(optimizer, 40)
    assert (target.sparsity, target.steps, target.begin, target.end) == (0.9, 40, 10, 30)


def test_a_target_needs_decay():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ConfigError, match=r"decay_schedule=target_sparsity: .*no p-norm decay"):
        TargetSchedule(sparsity=0.9).attach(optimizer, 10)
