"""The sanity run of document B: its network learns ten samples by heart."""

import numpy as np

import fastcnn
from fastcnn.train import Trainer


def test_overfits_ten_samples_with_adam():
    """The diary needed 37 epochs; random images with random labels leave nothing to generalise from."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((10, 3, 32, 32)).astype(np.float32)
    y = rng.permutation(10)
    net = fastcnn.models.create("cifar-small", input_shape=(3, 32, 32), num_classes=10, seed=0)
    trainer = Trainer(net, fastcnn.optim.Adam(net.parameters(), lr=1e-3))
    history = trainer.fit([(x, y)], epochs=100)
    assert trainer.evaluate((x, y)).accuracy == 1.0
    assert history["train_loss"][-1] < 0.1
    np.testing.assert_array_equal(trainer.predict_classes(x), y)
