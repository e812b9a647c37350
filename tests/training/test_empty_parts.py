"""Heads of timm's families in training: ranks without pictures, and more steps than one."""

from __future__ import annotations

import copy

import pytest
import torch

from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.models.parts import parts_of, set_modes
from fixres_dist.models.precision import Arithmetic
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session, tell

torch.set_num_threads(1)


def session_of(name: str) -> Session:
    model, ranks = build_model(name, 5), Ranks(0, 1, 1, ("here",), torch.device("cpu"))
    config = reading.parse(Config, {"model": {"timm_name": name}})
    arithmetic = Arithmetic("fp32", torch.device("cpu"))
    return Session(config, ranks, model, preprocessing(name), {}, (), {}, arithmetic, torch.contiguous_format, tell)


@pytest.mark.parametrize(
    ("name", "policy", "res"),
    [
        ("mobilevitv2_050", "classifier+bn", 128),
        ("test_maxvit", "all", 160),
        ("levit_128s", "all", 224),
        ("levit_128s", "last_block", 224),
        ("test_efficientnet", "all", 64),
    ],
)
def test_a_head_without_pictures_has_no_logits_and_gradients_of_zero(name: str, policy: str, res: int) -> None:
    """A rank's part of a batch may be empty, and DDP orders its buckets in two backward passes of none (step.py)."""
    session = session_of(name)
    parts = parts_of(session.model, policy)
    set_modes(parts, "kept")
    for _ in range(2):
        nothing = torch.zeros(0, 3, res, res, dtype=torch.uint8)
        logits = session.logits(parts, parts.head, session.inputs(parts, nothing))
        assert logits.shape == (0, 5)
        logits.sum().backward()
    trained = [p for p in parts.head.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is None or not p.grad.any() for p in trained)


@pytest.mark.parametrize("policy", ["last_block", "attention"])
def test_a_table_of_biases_is_made_anew_at_every_step(policy: str) -> None:
    """LeViT keeps it in eval mode, with the graph of the step that made it, and with that step's weights."""
    session = session_of("levit_128s")
    parts = parts_of(session.model, policy)
    pictures = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    inputs = session.inputs(parts, pictures)
    session.model.eval()
    session.logits(parts, parts.head, inputs)  # an evaluation before training
    set_modes(parts, "kept")
    for _ in range(2):
        session.logits(parts, parts.head, inputs).sum().backward()
        with torch.no_grad():
            for p in parts.head.parameters():
                p -= 0.1 if p.requires_grad else 0.0
    session.model.eval()
    parts.head.eval()
    fresh = build_model("levit_128s", 5)
    fresh.load_state_dict(copy.deepcopy(session.model.state_dict()))
    with torch.no_grad():
        expected = fresh(session.to_device(pictures))
        assert torch.allclose(session.model(session.to_device(pictures)), expected, atol=1e-5)
