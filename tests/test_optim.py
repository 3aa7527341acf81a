"""Optimisers against plain NumPy formulas; groups, segments, state_dicts, clipping, schedules."""

import copy
import math
import pickle

import numpy as np
import pytest

from fastcnn import nn, optim
from fastcnn.optim import lr_scheduler


def model(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 2))
    if dtype == np.float64:
        net.double()
    for parameter in net.parameters():
        parameter.data = rng.standard_normal(parameter.shape).astype(dtype)
    return net


def draw_gradients(net, seed):
    rng = np.random.default_rng(seed)
    for parameter in net.parameters():
        parameter.grad = rng.standard_normal(parameter.shape)


def sgd(param, grads, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    velocity = None
    for grad in grads:
        d = (-grad if maximize else grad) + weight_decay * param
        if momentum:
            velocity = d if velocity is None else momentum * velocity + (1 - dampening) * d
            d = d + momentum * velocity if nesterov else velocity
        param = param - lr * d
    return param


def adam(param, grads, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False, decoupled=False):
    m = v = np.zeros_like(param)
    for t, grad in enumerate(grads, 1):
        g = -grad if maximize else grad
        if decoupled:
            param = param - lr * weight_decay * param
        else:
            g = g + weight_decay * param
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        param = param - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return param


CASES = {
    "sgd": (optim.SGD, sgd, {"lr": 0.1}),
    "decay": (optim.SGD, sgd, {"lr": 0.1, "weight_decay": 0.2}),
    "momentum": (optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "dampening": (optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "nesterov": (optim.SGD, sgd, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "sgd, climbing": (
        optim.SGD,
        sgd,
        {"lr": 0.1, "momentum": 0.5, "maximize": True, "weight_decay": 0.1},
    ),
    "adam": (optim.Adam, adam, {"lr": 0.01}),
    "adam, all": (optim.Adam, adam, {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    "adam, climbing": (optim.Adam, adam, {"lr": 0.01, "maximize": True}),
    "adamw": (
        optim.AdamW,
        lambda *a, **k: adam(*a, decoupled=True, **k),
        {"lr": 0.01, "weight_decay": 0.1},
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


class TestSteps:
    def test_formula(self, case):
        make, formula, arguments = case
        net = model()
        start = [parameter.data.copy() for parameter in net.parameters()]
        grads = [[] for _ in start]
        opt = make(net.parameters(), **arguments)
        assert len(opt._flats[0].segments) == 1
        for step in range(5):
            draw_gradients(net, step)
            for kept, parameter in zip(grads, net.parameters(), strict=True):
                kept.append(parameter.grad.copy())
            opt.step()
        for parameter, value, history in zip(net.parameters(), start, grads, strict=True):
            np.testing.assert_allclose(parameter.data, formula(value, history, **arguments), rtol=1e-12)

    def test_the_gaps_between_parameters_stay_zero(self, case):
        make, _, arguments = case
        net = model()
        opt = make(net.parameters(), **arguments)
        draw_gradients(net, 0)
        opt.step()
        segment = opt._flats[0].segments[0]
        values = sum(parameter.size for parameter in net.parameters())
        assert np.count_nonzero(segment.data) <= values < segment.data.size
        assert all(np.count_nonzero(array) <= values for array in segment.state.values())

    def test_zero_grad_on_the_way(self, case):
        make, _, arguments = case
        one, other = model(), model()
        opts = [make(net.parameters(), **arguments) for net in (one, other)]
        for step in range(3):
            for net in (one, other):
                draw_gradients(net, step)
            opts[0].step(zero_grad=True)
            opts[1].step()
            opts[1].zero_grad()
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            np.testing.assert_array_equal(p.data, q.data)
            assert not p.grad.any()
            assert not q.grad.any()

    def test_separate_parameters_and_a_gathered_model_agree(self, case):
        make, _, arguments = case
        gathered = model()
        loose = [nn.Parameter(p.data, order=p._order) for p in gathered.parameters()]
        opts = [make(gathered.parameters(), **arguments), make(loose, **arguments)]
        assert len(opts[1]._flats[0].segments) == len(loose)
        for step in range(3):
            draw_gradients(gathered, step)
            for p, q in zip(loose, gathered.parameters(), strict=True):
                p.grad = q.grad
            for opt in opts:
                opt.step()
        for p, q in zip(loose, gathered.parameters(), strict=True):
            np.testing.assert_array_equal(p.data, q.data)

    def test_nan_is_not_hidden(self, case):
        make, _, arguments = case
        net = model()
        opt = make(net.parameters(), **arguments)
        draw_gradients(net, 0)
        net[2].bias.grad[1] = np.nan
        net[3].bias.grad[0] = np.inf
        opt.step()
        assert np.isnan(net[2].bias.data).tolist() == [False, True, False, False, False]
        assert not np.isfinite(net[3].bias.data[0])

    def test_frozen_parameters_stay(self, case):
        make, formula, arguments = case
        net = model()
        opt = make(net.parameters(), **arguments)
        net[2].requires_grad_(False)
        frozen, start = net[2].weight.data.copy(), net[3].weight.data.copy()
        grads = []
        for step in range(3):
            draw_gradients(net, step)
            grads.append(net[3].weight.grad.copy())
            opt.step()
        np.testing.assert_array_equal(net[2].weight.data, frozen)
        np.testing.assert_allclose(net[3].weight.data, formula(start, grads, **arguments), rtol=1e-12)
        net[2].requires_grad_(True)
        draw_gradients(net, 9)
        grad = net[2].weight.grad.copy()
        grads.append(net[3].weight.grad.copy())
        opt.step()
        np.testing.assert_allclose(net[2].weight.data, formula(frozen, [grad], **arguments), rtol=1e-12)
        np.testing.assert_allclose(net[3].weight.data, formula(start, grads, **arguments), rtol=1e-12)


class TestMoves:
    """The optimiser finds its parameters wherever they have gone."""

    def test_model_built_into_a_larger_one(self, case):
        make, formula, arguments = case
        net = model()
        opt = make(net.parameters(), **arguments)
        start, grads = net[2].weight.data.copy(), []
        for step in range(4):
            draw_gradients(net, step)
            grads.append(net[2].weight.grad.copy())
            if step == 2:
                outer = nn.Sequential(nn.Linear(2, 2), net, nn.Linear(2, 2)).double()
                assert len(outer.parameters()) == 10
            opt.step()
        np.testing.assert_allclose(net[2].weight.data, formula(start, grads, **arguments), rtol=1e-12)
        opt.zero_grad()
        assert not any(parameter.grad.any() for parameter in net.parameters())

    def test_conversion_to_float64_and_back(self, case):
        make, formula, arguments = case
        net = model(dtype=np.float32)
        opt = make(net.parameters(), **arguments)
        start = [parameter.data.astype(float) for parameter in net.parameters()]
        grads = [[] for _ in start]
        for step in range(4):
            if step == 2:
                net.double()
            draw_gradients(net, step)
            for kept, parameter in zip(grads, net.parameters(), strict=True):
                kept.append(parameter.grad.copy())
            opt.step()
        for parameter, value, history in zip(net.parameters(), start, grads, strict=True):
            expected = formula(value, history, **arguments)
            np.testing.assert_allclose(parameter.data, expected, rtol=1e-4, atol=1e-5)
        assert opt._flats[0].segments[0].data.dtype == np.float64

    def test_several_optimisers_on_one_model(self):
        net = model()
        first = optim.SGD(net[:2].parameters(), lr=0.1)
        second = optim.Adam(net[2:].parameters(), lr=0.1)
        before = [parameter.data.copy() for parameter in net.parameters()]
        draw_gradients(net, 0)
        first.step()
        moved = [
            not np.array_equal(parameter.data, value)
            for parameter, value in zip(net.parameters(), before, strict=True)
        ]
        assert moved == [True, True, False, False, False, False]
        second.step()
        assert all(
            not np.array_equal(parameter.data, value)
            for parameter, value in zip(net.parameters(), before, strict=True)
        )
        first.zero_grad()
        assert not net[0].weight.grad.any()
        assert net[2].weight.grad.any()

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
    def test_copies_of_model_and_optimiser_go_on_together(self, case, twin):
        make, _, arguments = case
        net = model()
        opt = make(net.parameters(), **arguments)
        draw_gradients(net, 0)
        opt.step()
        other, its = twin((net, opt))
        for step in range(1, 3):
            for one in (net, other):
                draw_gradients(one, step)
            opt.step()
            its.step()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            np.testing.assert_array_equal(p.data, q.data)
            assert not np.shares_memory(p.data, q.data)

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_a_copied_optimiser_updates_its_own_parameters(self, twin):
        opt = optim.SGD([nn.Parameter(np.array([1.0]))], lr=1.0, momentum=0.5)
        opt.param_groups[0]["params"][0].grad[...] = 1
        opt.step()
        other = twin(opt)
        parameter = other.param_groups[0]["params"][0]
        parameter.grad[...] = 1
        other.step()
        np.testing.assert_array_equal(parameter.data, -1.5)
        np.testing.assert_array_equal(opt.param_groups[0]["params"][0].data, 0)


class TestGroups:
    def test_hyperparameters_of_their_own(self):
        net = model()
        opt = optim.SGD([{"params": net[0].parameters()}, {"params": net[3].weight, "lr": 0.0}], lr=0.5)
        assert [group["lr"] for group in opt.param_groups] == [0.5, 0.0]
        kept = net[3].weight.data.copy()
        draw_gradients(net, 0)
        opt.step()
        np.testing.assert_array_equal(net[3].weight.data, kept)
        opt.param_groups[1]["lr"] = 0.1
        opt.step()
        np.testing.assert_allclose(net[3].weight.data, kept - 0.1 * net[3].weight.grad)

    def test_momentum_switched_on_later_starts_with_the_gradient(self):
        parameter = nn.Parameter(np.array([1.0]))
        opt = optim.SGD([parameter], lr=1.0, dampening=0.5)
        parameter.grad[...] = 1
        opt.step()
        opt.param_groups[0]["momentum"] = 0.9
        opt.step()
        np.testing.assert_allclose(parameter.data, -1)
        opt.step()
        np.testing.assert_allclose(parameter.data, -1 - (0.9 + 0.5))

    def test_a_group_added_later(self):
        net = model()
        opt = optim.Adam(net[0].parameters())
        draw_gradients(net, 0)
        opt.step()
        opt.add_param_group({"params": net[2].parameters(), "lr": 0.1})
        kept = net[2].weight.data.copy()
        opt.step()
        # Adam's first step has the size of the learning rate.
        np.testing.assert_allclose(abs(net[2].weight.data - kept), 0.1, rtol=1e-4)

    def test_repr(self):
        assert "lr: 0.5" in repr(optim.SGD([nn.Parameter(np.zeros(1))], lr=0.5))

    @pytest.mark.parametrize(
        ("params", "error", "message"),
        [
            ([], ValueError, "params: the list is empty"),
            ([{"params": []}], ValueError, "params: the list is empty"),
            (nn.Parameter(np.zeros(1)), TypeError, "params: expected a list of Parameters"),
            ([np.zeros(1)], TypeError, "params: expected Parameters, got ndarray"),
            ([{"parameters": []}], TypeError, "params: expected a dict with 'params'"),
            ([nn.Parameter(np.zeros(1))] * 2, ValueError, "is there twice"),
            (
                [nn.Parameter(np.zeros(1)), nn.Parameter(np.zeros(1, np.float32))],
                TypeError,
                "params: float32 and float64 parameters need groups of their own",
            ),
        ],
    )
    def test_bad_parameters(self, params, error, message):
        with pytest.raises(error, match=message):
            optim.SGD(params)

    @pytest.mark.parametrize(
        ("make", "arguments", "message"),
        [
            (optim.SGD, {"lr": -1}, "lr: -1 is below 0"),
            (optim.SGD, {"lr": math.nan}, "lr: nan is below 0.0, or not finite"),
            (optim.SGD, {"momentum": -0.1}, "momentum: -0.1 is below"),
            (optim.SGD, {"weight_decay": -1}, "weight_decay: -1 is below"),
            (optim.SGD, {"nesterov": True}, "nesterov: True needs a momentum"),
            (optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
            (optim.Adam, {"lr": -1}, "lr: -1 is below"),
            (optim.Adam, {"eps": -1}, "eps: -1 is below"),
            (optim.Adam, {"betas": (1.0, 0.9)}, r"betas\[0\]: 1.0 is not between 0.0 and 1.0"),
            (optim.Adam, {"betas": (0.9, -0.1)}, r"betas\[1\]"),
            (optim.Adam, {"betas": (0.9,)}, "betas: expected two"),
            (optim.AdamW, {"weight_decay": -1}, "weight_decay"),
        ],
    )
    def test_bad_hyperparameters(self, make, arguments, message):
        with pytest.raises(ValueError, match=message):
            make([nn.Parameter(np.zeros(1))], **arguments)


class TestStateDict:
    def test_round_trip_continues_bit_for_bit(self, case):
        make, _, arguments = case
        net, other = model(), model()
        opts = [make(one.parameters(), **arguments) for one in (net, other)]
        for step in range(3):
            draw_gradients(net, step)
            opts[0].step()
        other.load_state_dict(net.state_dict())
        opts[1].load_state_dict(pickle.loads(pickle.dumps(opts[0].state_dict())))
        for step in range(3, 6):
            for one, opt in zip((net, other), opts, strict=True):
                draw_gradients(one, step)
                opt.step()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            np.testing.assert_array_equal(p.data, q.data)

    def test_pytorchs_form(self):
        net = model()
        opt = optim.Adam(
            [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.5}], lr=0.1
        )
        assert opt.state_dict()["state"] == {}
        draw_gradients(net, 0)
        opt.step()
        state = opt.state_dict()
        assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3]]
        assert state["param_groups"][1]["lr"] == 0.5
        assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["state"][0]["exp_avg"].shape == (3, 2, 3, 3)
        np.testing.assert_allclose(state["state"][0]["exp_avg"], 0.1 * net[0].weight.grad)
        assert state["state"][2]["step"] == 1
        assert optim.SGD(net.parameters(), momentum=0.9).state_dict()["state"] == {}

    def test_sgd_without_momentum_has_no_state(self):
        net = model()
        opt = optim.SGD(net.parameters(), lr=0.1)
        draw_gradients(net, 0)
        opt.step()
        assert opt.state_dict()["state"] == {}
        opt.load_state_dict(opt.state_dict())

    def test_hyperparameters_come_along(self):
        net = model()
        opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        opt.load_state_dict(optim.SGD(net.parameters(), lr=0.5, nesterov=True, momentum=0.5).state_dict())
        group = opt.param_groups[0]
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.5, 0.5, True)

    def test_nothing_changes_unless_everything_fits(self):
        net = model()
        opt = optim.Adam(net.parameters(), lr=0.1)
        draw_gradients(net, 0)
        opt.step()
        before = opt.state_dict()
        wrong_shape = copy.deepcopy(before)
        wrong_shape["param_groups"][0]["lr"] = 7
        wrong_shape["state"][1]["exp_avg"] = np.zeros(4)
        wrong_group = copy.deepcopy(before)
        wrong_group["param_groups"][0]["params"].pop()
        wrong_value = copy.deepcopy(before)
        wrong_value["param_groups"][0]["lr"] = -1
        for bad, message in (
            (wrong_shape, r"state_dict: exp_avg of shape \(4,\) is not the parameter's \(3,\)"),
            (wrong_group, r"state_dict: groups of \[5\] parameters are not the optimiser's \[6\]"),
            (wrong_value, "lr: -1"),
            ({"state": {}}, "state_dict: has no 'param_groups'"),
        ):
            with pytest.raises(ValueError, match=message):
                opt.load_state_dict(bad)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        np.testing.assert_array_equal(after["state"][1]["exp_avg"], before["state"][1]["exp_avg"])


class TestClipping:
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
    def test_formula(self, norm_type):
        net = model()
        draw_gradients(net, 0)
        grads = [parameter.grad.copy() for parameter in net.parameters()]
        norm = np.linalg.norm(np.concatenate([grad.ravel() for grad in grads]), norm_type)
        assert optim.clip_grad_norm_(net.parameters(), 0.5, norm_type) == pytest.approx(norm)
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            np.testing.assert_allclose(parameter.grad, grad * 0.5 / (norm + 1e-6))

    def test_small_gradients_stay(self):
        net = model()
        draw_gradients(net, 0)
        kept = net[0].weight.grad.copy()
        optim.clip_grad_norm_(net.parameters(), 1e9)
        np.testing.assert_array_equal(net[0].weight.grad, kept)

    def test_large_float32_gradients_do_not_overflow(self):
        parameter = nn.Parameter(np.zeros(20000, np.float32))
        parameter.grad[...] = 1e30
        assert optim.clip_grad_norm_(parameter, 1.0) == pytest.approx(1e30 * math.sqrt(20000))
        np.testing.assert_allclose(np.linalg.norm(parameter.grad), 1, rtol=1e-5)

    @pytest.mark.parametrize("norm_type", [2.0, math.inf])
    def test_nan_is_not_hidden(self, norm_type):
        net = model()
        draw_gradients(net, 0)
        net[3].bias.grad[0] = np.nan
        kept = net[0].weight.grad.copy()
        with pytest.raises(RuntimeError, match="parameters: the norm of the gradients is nan"):
            optim.clip_grad_norm_(net.parameters(), 1.0, norm_type, error_if_nonfinite=True)
        np.testing.assert_array_equal(net[0].weight.grad, kept)
        assert math.isnan(optim.clip_grad_norm_(net.parameters(), 1.0, norm_type))
        assert np.isnan(net[0].weight.grad).all()

    def test_nothing_to_clip(self):
        assert optim.clip_grad_norm_([], 1.0) == 0
        assert optim.clip_grad_norm_([], 1.0, math.inf) == 0
        net = model().requires_grad_(False)
        draw_gradients(net, 0)
        assert optim.clip_grad_norm_(net.parameters(), 1.0) == 0

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="max_norm: -1"):
            optim.clip_grad_norm_([], -1)
        with pytest.raises(ValueError, match="norm_type: 0"):
            optim.clip_grad_norm_([], 1, 0)


class TestSchedules:
    def rates(self, make, count, lr=1.0):
        opt = optim.SGD([nn.Parameter(np.zeros(1))], lr=lr)
        scheduler = make(opt)
        rates = [opt.param_groups[0]["lr"]]
        for _ in range(count):
            scheduler.step()
            rates.append(opt.param_groups[0]["lr"])
            assert scheduler.get_last_lr() == [rates[-1]]
        return rates

    def test_steps(self):
        rates = self.rates(lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5), 5)
        assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]

    def test_cosine(self):
        rates = self.rates(lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4, eta_min=0.2), 4)
        np.testing.assert_allclose(rates, [0.2 + 0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(5)])

    def test_warmup(self):
        rates = self.rates(lambda opt: lr_scheduler.CosineWarmupLR(opt, 8, 4, min_lr=0.1), 10, lr=2.0)
        cosine = [0.1 + 1.9 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)]
        np.testing.assert_allclose(rates, [0.5, 1.0, 1.5, 2.0, *cosine, 0.1, 0.1])

    def test_no_warmup_and_nothing_else(self):
        assert self.rates(lambda opt: lr_scheduler.CosineWarmupLR(opt, 2, 0), 2)[0] == 1.0
        np.testing.assert_allclose(
            self.rates(lambda opt: lr_scheduler.CosineWarmupLR(opt, 2, 2), 3), [0.5, 1.0, 1.0, 0.0]
        )

    def test_groups_keep_their_ratio(self):
        groups = [{"params": [nn.Parameter(np.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
        opt = optim.SGD(groups)
        scheduler = lr_scheduler.StepLR(opt, 1)
        scheduler.step()
        np.testing.assert_allclose(scheduler.get_last_lr(), [0.1, 0.01])

    @pytest.mark.parametrize(
        "make",
        [
            lambda opt: lr_scheduler.StepLR(opt, 3),
            lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
            lambda opt: lr_scheduler.CosineWarmupLR(opt, 10, 3),
        ],
    )
    def test_resuming(self, make):
        opts = [optim.SGD([nn.Parameter(np.zeros(1))], lr=0.3) for _ in range(2)]
        schedulers = [make(opt) for opt in opts]
        for _ in range(4):
            schedulers[0].step()
        opts[1].load_state_dict(opts[0].state_dict())
        schedulers[1].load_state_dict(schedulers[0].state_dict())
        for _ in range(4):
            for scheduler in schedulers:
                scheduler.step()
            assert opts[0].param_groups[0]["lr"] == opts[1].param_groups[0]["lr"]

    def test_checks(self):
        opt = optim.SGD([nn.Parameter(np.zeros(1))], lr=0.3)
        with pytest.raises(TypeError, match="optimizer: expected an Optimizer, got list"):
            lr_scheduler.StepLR([], 1)
        with pytest.raises(ValueError, match="step_size: 0 is below 1"):
            lr_scheduler.StepLR(opt, 0)
        with pytest.raises(ValueError, match="warmup_steps: 5 is more than total_steps 4"):
            lr_scheduler.CosineWarmupLR(opt, 4, 5)
        with pytest.raises(ValueError, match="eta_min: -1"):
            lr_scheduler.CosineAnnealingLR(opt, 4, -1)
        step = lr_scheduler.StepLR(opt, 1)
        with pytest.raises(ValueError, match="state_dict: entries"):
            step.load_state_dict(lr_scheduler.CosineAnnealingLR(opt, 4).state_dict())
        with pytest.raises(ValueError, match="state_dict: 2 groups are not the optimiser's 1"):
            step.load_state_dict(step.state_dict() | {"base_lrs": [1, 2]})
