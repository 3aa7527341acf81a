"""NaN and infinity: the step and the first layer are named, and no parameter is spoilt."""

import numpy as np
import pytest

import fastcnn
from fastcnn import nn
from fastcnn.train import NonFiniteLossError, Trainer, load_checkpoint


def batches(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((4, 1, 4, 4)).astype(np.float32), rng.integers(0, 3, 4)) for _ in range(count)
    ]


def trainer(run_dir=None):
    fastcnn.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)),
        nn.Linear(8, 3),
    )
    return Trainer(net, fastcnn.optim.SGD(net.parameters(), lr=0.01), run_dir=run_dir)


def test_nan_in_the_images(tmp_path):
    run = trainer(tmp_path)
    good, bad = batches(), batches()
    run.fit(good, epochs=1)
    parameters = [p.data.copy() for p in run.model.parameters()]
    saved = load_checkpoint(tmp_path / "last").model
    bad[0][0][2, 0, 1, 1] = np.nan
    with pytest.raises(NonFiniteLossError, match=r"step 4 \(epoch 2, batch 1\): the loss is nan") as error:
        run.fit(bad, epochs=2)
    assert "first not finite: the images of the batch" in str(error.value)
    assert error.value.layer is None
    assert (error.value.step, error.value.epoch, error.value.batch) == (4, 2, 1)
    for parameter, before in zip(run.model.parameters(), parameters, strict=True):
        np.testing.assert_array_equal(parameter.data, before)
    last = load_checkpoint(tmp_path / "last")
    assert last.epoch == 1
    for name, array in saved.items():
        np.testing.assert_array_equal(last.model[name], array)
    # The run goes back to the last good state and on.
    assert len(run.fit(good, epochs=2, resume=True)) == 2


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [("0.weight", "0", "Conv2d"), ("1.bias", "1", "BatchNorm2d"), ("3.bias", "3", "Linear")],
)
def test_nan_in_a_parameter(name, layer, kind):
    run = trainer()
    parameter = dict(run.model.named_parameters())[name]
    parameter.data.flat[0] = np.nan
    with pytest.raises(NonFiniteLossError) as error:
        run.fit(batches(), epochs=1)
    assert error.value.layer == layer
    assert error.value.what == f"parameter {name.split('.')[1]!r}"
    assert f"of layer {layer!r} ({kind})" in str(error.value)


def test_overflow_in_an_output():
    run = trainer()
    run.model[1].weight.data[...] = 3e38
    with pytest.raises(NonFiniteLossError) as error:
        run.fit(batches(), epochs=1)
    assert error.value.what == "the output"
    assert error.value.layer == "1"


class BadBackward(nn.ReLU):
    def backward(self, dout, input_grad=True):
        return super().backward(dout) * np.float32(np.inf)


def test_gradient_that_is_not_finite_stops_before_the_update():
    run = trainer()
    run.model[2][0] = BadBackward()
    before = [p.data.copy() for p in run.model.parameters()]
    with np.errstate(invalid="ignore"), pytest.raises(NonFiniteLossError) as error:
        run.fit(batches(), epochs=1)
    assert "step 1 (epoch 1, batch 1): a gradient is not finite" in str(error.value)
    assert np.isfinite(error.value.loss)
    assert (error.value.layer, error.value.what) == ("2.0", "the gradient of the input")
    for parameter, value in zip(run.model.parameters(), before, strict=True):
        np.testing.assert_array_equal(parameter.data, value)


def test_gradient_of_a_layer_that_runs_twice():
    bad = BadBackward()
    net = nn.Sequential(nn.Linear(4, 4), bad, nn.Linear(4, 4), bad, nn.Linear(4, 2))
    run = Trainer(net, fastcnn.optim.SGD(net.parameters(), lr=0.1))
    data = [(np.ones((3, 4), np.float32), np.array([0, 1, 0]))]
    with np.errstate(invalid="ignore"), pytest.raises(NonFiniteLossError, match=r"parameter '2.bias' of Seq"):
        run.fit(data, epochs=1)


class BadLoss(nn.CrossEntropyLoss):
    def __call__(self, logits, y):
        return super().__call__(logits, y) * float("inf")


def test_loss_that_is_itself_to_blame():
    run = trainer()
    run.loss_fn = BadLoss()
    with pytest.raises(NonFiniteLossError, match="the loss itself, of finite outputs"):
        run.fit(batches(), epochs=1)


def test_every_label_ignored():
    run = trainer()
    x, y = batches(1)[0]
    with np.errstate(invalid="ignore"), pytest.raises(NonFiniteLossError, match="is every label ignored"):
        run.fit([(x, np.full_like(y, -100))], epochs=1)


def test_evaluation_names_the_batch():
    run = trainer()
    data = batches()
    data[1][0][0] = np.inf
    mode = run.model.training
    with pytest.raises(NonFiniteLossError, match=r"batch 2 of an evaluation: the loss is nan; .* the images"):
        run.evaluate(data)
    assert run.model.training is mode


def test_validation_within_fit_keeps_the_last_epoch(tmp_path):
    run = trainer(tmp_path)
    bad = batches()
    bad[0][0][0] = np.nan
    with pytest.raises(NonFiniteLossError, match="batch 1 of an evaluation"):
        run.fit(batches(), bad, epochs=1)
    assert load_checkpoint(tmp_path / "last").epoch == 0
    assert len(run.history) == 0
    assert len(run.fit(batches(), batches(), epochs=1)) == 1


def test_a_model_that_is_no_sequential():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(x)

        def backward(self, dout, input_grad=True):
            return self.linear.backward(dout, input_grad)

    net = Own()
    net.linear.bias.data[0] = np.inf
    run = Trainer(net, fastcnn.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(NonFiniteLossError, match=r"parameter 'linear\.bias' of Own"):
        run.fit([(np.ones((3, 4), np.float32), np.array([0, 1, 0]))], epochs=1)


def test_the_search_leaves_the_model_as_it_was():
    from fastcnn.train.nonfinite import find_culprit

    run = trainer()
    before = run.model.state_dict()
    x, y = batches(1)[0]
    culprit = find_culprit(run.model, run.loss_fn, x, y, backward=True)
    assert culprit.text() == "nothing, when the batch is run again"
    for name, array in run.model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert all(not p.grad.any() for p in run.model.parameters())
