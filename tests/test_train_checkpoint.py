"""Checkpoints: to disk and back, crashes and full disks on the way, and files that are no checkpoints."""

import contextlib
import copy
import errno
import hashlib
import json
import os
import struct
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcnn
from fastcnn import nn
from fastcnn.train import Checkpoint, CheckpointError, History, load_checkpoint, save_checkpoint
from fastcnn.train.state import pack, unpack


def network(hidden=4, seed=0):
    fastcnn.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, hidden))


def stepped(seed=0, optimizer=fastcnn.optim.Adam, **options):
    """A network, its optimiser and a scheduler after one step."""
    net = network(seed=seed)
    opt = optimizer(net.parameters(), lr=0.01, **options)
    scheduler = fastcnn.optim.lr_scheduler.StepLR(opt, step_size=2)
    logits = net(np.random.default_rng(seed).standard_normal((3, 1, 4, 4), np.float32))
    net.backward(logits, input_grad=False)
    opt.step()
    scheduler.step()
    return net, opt, scheduler


def everything(net, opt, scheduler, generator):
    states = net.state_dict(), opt.state_dict(), scheduler.state_dict(), generator.bit_generator.state
    return copy.deepcopy(states)


def assert_same(first, second):
    """Equal bit for bit, whatever is nested in what."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, np.ndarray):
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        assert first.tobytes() == second.tobytes()
    else:
        assert first == second or (first != first and second != second)


def saved_run(path, seed=0):
    objects = *stepped(seed), np.random.default_rng(seed)
    net, opt, scheduler, generator = objects
    checkpoint = Checkpoint.take(
        net,
        opt,
        scheduler,
        {"default": generator},
        step=1,
        model_config={"name": "emotion", "input_shape": (1, 4, 4), "num_classes": 4},
        normalize={"mean": [0.5], "std": [0.25]},
        classes=("a", "b", "ç", "d"),
    )
    save_checkpoint(path, checkpoint, overwrite=True)
    return objects


# State

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.builds(
            lambda shape, dtype: (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype),
            st.lists(st.integers(0, 3), max_size=3),
            st.sampled_from(["f4", "f8", "i8", "u8", "?", "u1", "f2"]),
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(), st.just("$tensor")), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100)
@given(values)
def test_state_comes_back_as_it_was(value):
    arrays = {}
    text = json.dumps(pack(value, "state", arrays), allow_nan=False)
    arrays = safetensors.numpy.load(safetensors.numpy.save(arrays))
    assert_same(unpack(json.loads(text), arrays), value)


def test_state_stores_the_values_and_not_the_memory():
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    arrays = {}
    content = pack({"a": array.T, "b": array[:, ::-2], "c": np.float32(2)}, "state", arrays)
    arrays = safetensors.numpy.load(safetensors.numpy.save(arrays))
    result = unpack(content, arrays)
    np.testing.assert_array_equal(result["a"], array.T)
    np.testing.assert_array_equal(result["b"], array[:, ::-2])
    assert result["c"] == 2.0


def test_state_keeps_arrays_apart_whose_paths_read_alike():
    value = {"a": {"b": np.zeros(1)}, "a.b": np.ones(2)}
    arrays = {}
    assert_same(unpack(pack(value, "state", arrays), arrays), value)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", np.array(["text"]), np.array([object()]), 1j])
def test_state_refuses_what_it_cannot_hold(value):
    with pytest.raises(TypeError, match=r"state\.x: a checkpoint can't hold"):
        pack({"x": value}, "state", {})


@pytest.mark.parametrize(
    "content",
    [
        {"$tensor": "missing"},
        {"$tensor": ["a"]},
        {"$tensor": "a", "b": 1},
        {"$tuple": 3},
        {"$items": [[1]]},
        {"$items": [[[], 1]]},
        {"$items": {"a": 1}},
        {"$float": "1.0"},
        {"$exec": "print()"},
    ],
)
def test_unpack_refuses(content):
    with pytest.raises(ValueError, match="state:"):
        unpack([content], {"a": np.zeros(1)})


# There and back


@pytest.mark.parametrize("ending", ["", ".json", ".safetensors"])
def test_round_trip(tmp_path, ending):
    objects = saved_run(tmp_path / "run.v1")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.v1.json", "run.v1.safetensors"]
    checkpoint = load_checkpoint(tmp_path / f"run.v1{ending}")
    assert checkpoint.classes == ("a", "b", "ç", "d")
    assert checkpoint.model_config == {"name": "emotion", "input_shape": (1, 4, 4), "num_classes": 4}
    assert checkpoint.normalize == {"mean": [0.5], "std": [0.25]}
    assert (checkpoint.epoch, checkpoint.step, checkpoint.history) == (0, 1, History())
    others = *stepped(1), np.random.default_rng(9)
    checkpoint.restore(*others[:3], {"default": others[3]})
    assert_same(everything(*others), everything(*objects))


@pytest.mark.parametrize(
    "bits", [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]
)
def test_every_bit_generator_comes_back(tmp_path, bits):
    generator = np.random.Generator(bits(3))
    generator.random(7)
    net = network()
    save_checkpoint(tmp_path / "run", Checkpoint.take(net, generators={"g": generator}))
    expected = generator.random(5)
    other = np.random.Generator(bits(4))
    load_checkpoint(tmp_path / "run").restore(net, generators={"g": other})
    np.testing.assert_array_equal(other.random(5), expected)


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "run.json").write_text("mine")
    with pytest.raises(FileExistsError, match="run: a checkpoint of this name exists"):
        save_checkpoint(tmp_path / "run", Checkpoint.take(network()))
    assert (tmp_path / "run.json").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_new_files_have_the_usual_permissions(tmp_path):
    saved_run(tmp_path / "run")
    (tmp_path / "other").touch()
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "other").stat().st_mode}


# Full disks and crashes


class Crash(BaseException):
    """Ends a write like a power cut: nothing after it runs that the test doesn't want to."""


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_leaves_the_older_checkpoint_whole(tmp_path, monkeypatch, function, call):
    objects = saved_run(tmp_path / "run")
    expected = everything(*objects)
    real, calls = getattr(os, function), []

    def fails_at_call(*args):
        calls.append(args)
        return _full() if len(calls) == call else real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fails_at_call)
        if (function, call) == ("fsync", 3):
            saved_run(tmp_path / "run", seed=5)  # the folder's, which may fail: both files are in place
            expected = everything(*stepped(5), np.random.default_rng(5))
        else:
            with pytest.raises(OSError, match=r"can't save a checkpoint: No space .* is whole") as error:
                saved_run(tmp_path / "run", seed=5)
            assert error.value.errno == errno.ENOSPC
    others = *stepped(1), np.random.default_rng(1)
    load_checkpoint(tmp_path / "run").restore(*others[:3], {"default": others[3]})
    assert_same(everything(*others), expected)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    # Once there is room again, saving works and tidies up.
    latest = saved_run(tmp_path / "run", seed=6)
    load_checkpoint(tmp_path / "run").restore(*others[:3], {"default": others[3]})
    assert_same(everything(*others), everything(*latest))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json", "run.safetensors"]


def test_full_disk_at_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", _full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "run", Checkpoint.take(network()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("crash_at", [1, 2, 3])
@pytest.mark.parametrize("second_crash_at", [1, 2, 3, 4])
def test_crash_after_crash_leaves_a_whole_checkpoint(tmp_path, monkeypatch, crash_at, second_crash_at):
    """A process that dies before any rename, twice in a row, at any of them."""
    path = tmp_path / "run"
    saved_run(path, seed=0)
    for seed, at in ((1, crash_at), (2, second_crash_at)):
        real, calls = os.replace, []

        def dies(*args, real=real, calls=calls, at=at):
            calls.append(args)
            if len(calls) == at:
                raise Crash
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dies)
            with contextlib.suppress(Crash):
                saved_run(path, seed=seed)
        assert load_checkpoint(path).model.keys() == network().state_dict().keys()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can't save a checkpoint"):
        save_checkpoint(tmp_path / "file" / "run", Checkpoint.take(network()))


# Files that are no checkpoints


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"run\.json: there is no such checkpoint file"):
        load_checkpoint(tmp_path / "run")
    saved_run(tmp_path / "run")
    (tmp_path / "run.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"run\.safetensors: there is no such file"):
        load_checkpoint(tmp_path / "run")
    saved_run(tmp_path / "other")
    (tmp_path / "other.json").unlink()
    with pytest.raises(CheckpointError, match=r"other\.json: there is no such"):
        load_checkpoint(tmp_path / "other.safetensors")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.json: can't be read"):
        load_checkpoint(tmp_path / "folder")


@pytest.mark.parametrize("keep", [0, 1, 7, 100, -1])
def test_truncated_tensors(tmp_path, keep):
    saved_run(tmp_path / "run")
    file = tmp_path / "run.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is damaged or of another checkpoint"):
        load_checkpoint(tmp_path / "run")


def test_one_flipped_bit(tmp_path):
    saved_run(tmp_path / "run")
    file = tmp_path / "run.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path / "run")


def test_tensors_of_another_run(tmp_path):
    saved_run(tmp_path / "run")
    saved_run(tmp_path / "other", seed=1)
    (tmp_path / "other.safetensors").replace(tmp_path / "run.safetensors")
    with pytest.raises(CheckpointError, match="of another checkpoint"):
        load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"tensors": 3}',
        b'{"tensors": {"bytes": 1}}',
        b"[" * 200_000,
        b"9" * 10_000,
    ],
)
def test_json_that_is_no_checkpoint(tmp_path, text):
    saved_run(tmp_path / "run")
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"run\.json: is not"):
        load_checkpoint(tmp_path / "run")


def _with_tensors(folder, content):
    """Pass `content` off as the tensors of the run, with the right digest."""
    header = json.loads((folder / "run.json").read_text())
    header["tensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "run.json").write_text(json.dumps(header))
    (folder / "run.safetensors").write_bytes(content)


def _safetensors(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",
        struct.pack("<Q", 2**63) + b"{}",
        _safetensors({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
        _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        _safetensors({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"),
    ],
)
def test_hostile_tensors_with_the_right_digest(tmp_path, content):
    saved_run(tmp_path / "run")
    _with_tensors(tmp_path, content)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "another"),
        ("version", 2),
        ("epoch", -1),
        ("epoch", 1),
        ("epoch", True),
        ("step", 1.5),
        ("complete", 1),
        ("history", {}),
        ("classes", "abc"),
        ("classes", [1]),
        ("model", None),
        ("model", {"0.weight": 3}),
        ("model", {"0.weight": {"$tensor": "nowhere"}}),
        ("optimizer", {"class": "Adam"}),
        ("optimizer", 3),
        ("scheduler", {"class": 1, "state": {}}),
        ("generators", []),
        ("model_config", "emotion"),
        (None, None),
    ],
)
def test_header_entries_are_checked(tmp_path, name, value):
    saved_run(tmp_path / "run")
    header = json.loads((tmp_path / "run.json").read_text())
    if name is None:
        del header["generators"]
    else:
        header[name] = value
    (tmp_path / "run.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match=r"run\.json: is not a valid checkpoint"):
        load_checkpoint(tmp_path / "run")


# Checkpoints of something else: nothing live changes


def _rejected(checkpoint, objects, message):
    net, opt, scheduler, generator = objects
    before = everything(*objects)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(net, opt, scheduler, {"default": generator})
    assert_same(everything(*objects), before)


@pytest.fixture
def objects():
    return *stepped(3), np.random.default_rng(3)


@pytest.fixture
def checkpoint(tmp_path):
    saved_run(tmp_path / "run")
    return load_checkpoint(tmp_path / "run")


def test_another_model(checkpoint, objects):
    other = network(hidden=5)
    opt = fastcnn.optim.Adam(other.parameters(), lr=0.01)
    scheduler = fastcnn.optim.lr_scheduler.StepLR(opt, step_size=2)
    _rejected(
        checkpoint, (other, opt, scheduler, objects[3]), r"another model: '3.weight' has shape \(4, 8\)"
    )
    checkpoint.model["4.weight"] = np.zeros(1)
    _rejected(checkpoint, objects, r"another model: it has an extra '4\.weight'")
    del checkpoint.model["4.weight"], checkpoint.model["3.bias"]
    _rejected(checkpoint, objects, r"another model: it lacks '3\.bias'")


def test_another_dtype(checkpoint, objects):
    checkpoint.model["0.bias"] = checkpoint.model["0.bias"].astype(np.float64)
    _rejected(checkpoint, objects, "'0.bias' has shape .* dtype float64")


def test_another_optimizer_or_scheduler(checkpoint, objects):
    net, _, _, generator = objects
    sgd = fastcnn.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    scheduler = fastcnn.optim.lr_scheduler.StepLR(sgd, step_size=2)
    _rejected(checkpoint, (net, sgd, scheduler, generator), "its optimizer is Adam, not SGD")
    cosine = fastcnn.optim.lr_scheduler.CosineAnnealingLR(objects[1], 10)
    _rejected(checkpoint, (net, objects[1], cosine, generator), "its scheduler is StepLR, not Cosine")
    checkpoint.scheduler = None
    _rejected(checkpoint, objects, "holds no scheduler")


@pytest.mark.parametrize("spoil", ["shape", "dtype", "missing", "nonsense"])
def test_optimizer_state_that_does_not_fit(checkpoint, objects, spoil):
    """An optimiser's kernels check no bounds, so that a wrong array must not get that far."""

    def spoiled(value):
        if isinstance(value, np.ndarray) and value.size > 1:
            return {"shape": value[:-1], "dtype": value.astype(np.int8), "missing": None, "nonsense": "x"}[
                spoil
            ]
        if isinstance(value, dict):
            return {key: spoiled(item) for key, item in value.items()}
        return [spoiled(item) for item in value] if isinstance(value, list) else value

    checkpoint.optimizer = spoiled(checkpoint.optimizer)
    _rejected(checkpoint, objects, "does not fit")


def test_another_random_generator(checkpoint, objects):
    other = np.random.Generator(np.random.MT19937(0))
    _rejected(checkpoint, (*objects[:3], other), "generator 'default' can't take its state")
    checkpoint.generators["default"] = {"bit_generator": "PCG64", "state": {"state": "x", "inc": 1}}
    _rejected(checkpoint, objects, "generator 'default' can't take its state")
    checkpoint.generators = {}
    _rejected(checkpoint, objects, r"its random generators are \[\], this run's are \['default'\]")


class Stateful:
    """Something live whose loading can fail half-way."""

    def __init__(self, fails_with=None):
        self.values = {"a": np.zeros(2), "b": np.zeros(2)}
        self.fails_with = fails_with

    def state_dict(self):
        return OrderedDict((key, value.copy()) for key, value in self.values.items())

    def load_state_dict(self, state):
        self.values["a"] = state["a"]
        if self.fails_with is not None and state["b"].any():
            raise self.fails_with
        self.values["b"] = state["b"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failure_half_way_is_undone(error):
    checkpoint = Checkpoint(
        model={"a": np.ones(2), "b": np.ones(2)},
        optimizer={"class": "Stateful", "state": {"a": np.ones(2), "b": np.ones(2)}},
    )
    model, optimizer = Stateful(), Stateful(error)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected):
        checkpoint.restore(model, optimizer)
    for live in (model, optimizer):
        assert not live.values["a"].any()
        assert not live.values["b"].any()
