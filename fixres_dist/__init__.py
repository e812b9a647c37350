"""FixRes for timm models, distributed: see README.md. In Python: `fixres_dist.load(path)` opens a trained model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fixres_dist.evaluation.classifier import Classifier

# OpenMP threads that wait by spinning starve the loader processes on the same cores, and a shared machine's other jobs:
# measured on 2 cores, training the built-in example takes 30 to 45 % less CPU time when they sleep instead.
# Read once, when torch loads its OpenMP library, so it stands before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# But some 20 microseconds of spinning, from one small operation to the next, cost nothing and save waking them each time:
# steps from cached features run 1.3 to 1.8 times as fast as with none (tf_efficientnet_b0 at 320 px, the same 2 cores).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def load(path: str | os.PathLike[str], res: int | None = None, settings: Sequence[str] = ()) -> Classifier:
    """The trained model at `path`: a finished run, or what `fixres export` wrote (the folder, or the weights in it).

    Its methods take paths (files, folders, .txt lists) and PIL images:

        model = fixres_dist.load("runs/b0-320")
        for one in model.predict(["cat.jpg", picture], top=5):
            print(one.image, one.classes, one.confidences)  # best first; confidences from 0 to 1
        model.embed("photos/")                              # what enters the classifier: float32 [n, channels]
        model.evaluate("/data/flowers")["top1"]             # percent on its val/, or on a folder of class folders

    `res`: another test resolution than the model's, in pixels. `settings`: such as ["run.precision=fp32"]. It runs on the
    first GPU, or on the CPU where there is none. Raises fixres_dist.base.errors.UserError, which says what to do.
    """
    from fixres_dist.evaluation.classifier import load as open_model  # imports torch

    return open_model(path, res, settings)
