"""The whole model as others load it: weights and configuration for timm, ONNX, and a push to the hub."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixres_dist.base.errors import UserError, first_line
from fixres_dist.base.files import publish, whole
from fixres_dist.config.schema import Config
from fixres_dist.evaluation.exported import KEY, Export
from fixres_dist.models.build import CROP_MODES, preprocessing, pretrained_cfg

ONNX_TOLERANCE = 1e-4  # relative to the largest logit; rounding alone stays below 1e-5
HUB_FILES = ("README.md", "config.json", "model.safetensors")


def timm_transform(config: Config, res: int) -> tuple[dict[str, Any], bool]:
    """(timm's settings for this evaluation, whether timm then makes the same picture).

    timm scales to floor(input_size / crop_pct) and cuts the centre: every rule but `fixres_height`, for which these are
    the settings of `fixres`.
    """
    spec = preprocessing(config.model.timm_name)
    resize = spec.resize(config.data, res)
    settings = {
        "input_size": (3, res, res),
        "crop_pct": spec.crop_pct_at(config.data, res),
        "crop_mode": next((mode for mode, side in CROP_MODES.items() if side == resize.side), "center"),
        "interpolation": resize.interpolation,
        "mean": spec.mean,
        "std": spec.std,
    }
    return settings, resize.side != "height"


def write_config(
    model: nn.Module, file: Path, config: Config, res: int, classes: list[str], temperature: float = 1.0
) -> None:  # fmt: skip
    """config.json in timm's hub form: `timm.create_model("local-dir:FOLDER", pretrained=True)` builds the model from it,
    and `timm.data.resolve_data_config` finds this evaluation's transform; `fixres predict` reads what timm's keys cannot say.
    """
    from timm.models._hub import save_config_for_hf

    own: Any = model
    stale = ("tag", "pool_size", "test_pool_size")  # of the starting weights
    settings, _ = timm_transform(config, res)
    settings |= {"test_input_size": settings["input_size"], "test_crop_pct": settings["crop_pct"]}
    own.pretrained_cfg = {**own.pretrained_cfg, **dict.fromkeys(stale), **settings, "num_classes": len(classes)}
    own.pretrained_cfg["license"] = licence(config)
    here = Export(
        res=res,
        resize_rule=config.data.resize_rule,
        crop_pct=config.data.crop_pct,
        policy=config.tune.policy,
        precision="fp32" if config.run.precision == "fp32" else "auto",
        temperature=temperature,
    )
    with whole(file) as part:
        save_config_for_hf(own, part, model_config={"label_names": classes, KEY: asdict(here)})


def licence(config: Config) -> str | None:
    """Of the starting weights as timm states it; None for a file's or new weights."""
    start = pretrained_cfg(config.model.timm_name)
    return start.license if start and config.model.weights in ("ns", "ap", "pretrained") else None


@torch.no_grad()
def write_onnx(model: nn.Module, file: Path, res: int) -> float:
    """One graph for pictures [n, 3, res, res] of any n (`tf_` models bake their SAME padding for one size).

    Of a model above torch's limit for one file (1.5 GiB of weights; protobuf's is 2 GiB) the weights stand in `data_file`.

    Returns the largest difference between onnxruntime's logits and torch's, relative to the largest logit. Raises
    RuntimeError above ONNX_TOLERANCE, UserError for a size the model does not take; no file is left behind then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}. Next: pip install -e .[export]") from None
    model = model.cpu().float().eval()
    images = torch.randn(3, 3, res, res, generator=torch.Generator().manual_seed(0))
    try:
        expected = model(images)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"the model does not take {res} px: {first_line(error)}") from None
    with whole(file) as part, tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
        made, batch = Path(folder) / file.name, ({0: "batch"},)
        program = torch.onnx.export(
            model, (images,), input_names=["images"], output_names=["logits"], dynamic_shapes=batch,
            dynamo=True, verbose=False,
        )  # fmt: skip
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # the stack that made each: paths of this machine
        program.save(made, external_data=False)
        session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
        worst = 0.0
        for n in (3, 1):
            (logits,) = session.run(["logits"], {"images": images[:n].numpy()})
            worst = max(worst, float((torch.from_numpy(logits) - expected[:n]).abs().max() / expected.abs().max()))
        if not worst <= ONNX_TOLERANCE:
            raise RuntimeError(f"logits of {file.name} are off by {worst:.1e} of the largest; at most {ONNX_TOLERANCE}")
        file.unlink(missing_ok=True)  # a kill between the two must not leave one with the other of an earlier export
        data_file(file).unlink(missing_ok=True)
        if data_file(made).exists():
            publish(data_file(made), data_file(file))
        os.replace(made, part)
    return worst


def data_file(file: Path) -> Path:
    """Where the weights of a large ONNX model stand, by the name that its graph has for them: they are moved together."""
    return file.with_name(f"{file.name}.data")


def push(folder: Path, repo: str) -> str:
    """Upload HUB_FILES of `folder` to the hub's model `repo`, made if it is new; returns the commit's address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="fixres_dist")
        name = api.create_repo(repo, exist_ok=True).repo_id
        return str(
            api.upload_folder(
                repo_id=name, folder_path=folder, allow_patterns=list(HUB_FILES), commit_message="Add model"
            )
        )
    except Exception as error:  # the client raises a dozen kinds, from DNS to HTTP status
        raise UserError(
            f"the hub did not take {repo}: {type(error).__name__}: {first_line(error).rstrip('.')}. "
            "Next: the same command on a machine with network, after hf auth login."
        ) from error
