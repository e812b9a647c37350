"""Mixup and CutMix by timm, as a function of the seed and the step: the same at any number of ranks and micro-batches."""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup, mixup_target

from fixres_dist.data.augment import seeded
from fixres_dist.data.order import keyed
from fixres_dist.training.stages import Stage


def mixed(
    stage: Stage, classes: int, step: int, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pictures fp32 [n, 3, h, w], targets): mixed, with soft targets [n, classes]; where the stage mixes nothing, as given.

    timm mixes the first picture of a batch with the last, and so on inwards. Here neighbours are mixed, which are always on
    one rank and in one forward pass (Stage.together), by the same draw in the whole step. A last one without a partner, and
    neighbours of a picture that could not be decoded, are mixed with who is there, or stay as they are.
    """
    own = stage.ordinary
    if not own.mixes:
        return images, labels
    pairs = len(labels) // 2 * 2
    alone = mixup_target(labels[pairs:], classes, smoothing=own.label_smoothing)
    if not pairs:
        return images, alone
    neighbours = torch.arange(pairs, device=images.device)
    outwards = torch.cat([neighbours[0::2], neighbours[1::2].flip(0)])
    mixup = Mixup(own.mixup, own.cutmix, label_smoothing=own.label_smoothing, num_classes=classes)
    with seeded(int(keyed(stage.seed, 4, step)[0])):
        made, targets = mixup(images[outwards], labels[outwards])
    return torch.cat([made, images[pairs:]]), torch.cat([targets, alone])
