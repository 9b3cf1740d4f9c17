from __future__ import annotations

import lightning as L
import pytest
import torch

from tests.digits import Classifier, Digits, trainer

torch.set_num_threads(1)  # the tensors are small: threads cost more than they bring


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained_once() -> Classifier:
    L.seed_everything(0, verbose=False)
    model = Classifier()
    trainer(6).fit(model, datamodule=Digits())
    return model


@pytest.fixture
def trained(trained_once: Classifier) -> Classifier:
    """A float model trained on digits, to be changed at will."""
    model = Classifier()
    model.load_state_dict(trained_once.state_dict())
    return model
