from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from support.folders import write_photos

from fixres_dist.base.errors import UserError
from fixres_dist.base.signals import StopFlag
from fixres_dist.base.small_files import read_lines
from fixres_dist.config import reading, recipes, timm_names
from fixres_dist.config.schema import Config
from fixres_dist.models import fast_trunk, policies, weights
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.models.parts import parts_of
from fixres_dist.runs import preparation
from fixres_dist.training import worker


def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write", recipes.folder() / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_rows_of_both_tables_are_there() -> None:
    found = recipes.every()
    assert len(found) == 18
    for recipe in found:
        config = reading.parse(Config, recipe.values)
        row = recipe.published
        assert row is not None
        assert config.data.res == int(row["fix_test_res"])
        assert config.model.timm_name == row["timm_name"]
        assert config.data.resize_rule == "fixefficientnet"
        path = recipes.folder() / f"{recipe.name}_{recipe.weights}.yaml"
        text = path.read_text()
        assert len(text.splitlines()) <= 25, path.name
        assert "our choice" in text.lower()
        assert row["fix_top1"] in text


@pytest.mark.parametrize(("name", "weights"), [("b0", "ns"), ("b8", "ap"), ("l2", "ns")])
def test_facts_in_the_recipes_are_what_the_script_measures(name: str, weights: str) -> None:
    text = (recipes.folder() / f"{name}_{weights}.yaml").read_text()
    assert text == writer().recipe(recipes.published()[name, weights])


@pytest.mark.parametrize(
    "policy", ["classifier", "classifier+bn_stats", "classifier+bn", "classifier+bn+conv_head", "last_block", "all"]
)
def test_planned_parameter_counts_are_the_models(policy: str) -> None:
    facts = recipes.find("b0").facts
    assert facts is not None
    model = build_model("tf_efficientnet_b0", 7)
    parts = parts_of(model, policy)
    assert facts.trainable(policy, 7) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts.total(7) == sum(p.numel() for p in model.parameters())
    assert parts.tuned.parameters
    if parts.trunk is not None:
        kept = fast_trunk.split_neck(parts.trunk)[0](torch.zeros(1, 3, 96, 96))
        assert 2 * sum(feature.numel() for feature in kept) / 1024 == pytest.approx(facts.kept_kib(policy, 96))


def test_advprop_and_noisy_student_have_their_own_preprocessing() -> None:
    ap, ns = (preprocessing(f"tf_efficientnet_b0.{tag}") for tag in ("ap_in1k", "ns_jft_in1k"))
    assert ap.mean == ap.std == (0.5, 0.5, 0.5)
    assert ns.mean == (0.485, 0.456, 0.406)


def test_timm_names_read_from_its_sources_are_timms() -> None:
    assert timm_names.architectures() == frozenset(timm.list_models())
    assert timm_names.former() == {old: new or "" for old, new in timm.models._registry._deprecated_models.items()}


@pytest.mark.parametrize(
    ("typed", "built"),
    [
        ("tf_efficientnet_b0_ap", "tf_efficientnet_b0.ap_in1k"),
        ("tf_efficientnet_l2_ns", "tf_efficientnet_l2.ns_jft_in1k"),
        ("tv_resnet50", "resnet50.tv_in1k"),
        ("hf_hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("HF-hub:timm/vit_base_patch16_224_in21k", "vit_base_patch16_224.augreg_in21k"),
        ("timm/resnet18", "resnet18"),
        ("hf-hub:someone/flowers-vit", "hf-hub:someone/flowers-vit"),
        ("hf_hub:someone/flowers-vit@v2", "hf-hub:someone/flowers-vit@v2"),
    ],
)
def test_names_that_timm_takes_are_taken_with_the_same_weights(typed: str, built: str) -> None:
    recipe = recipes.find(typed)
    assert recipe.values["model"]["timm_name"] == built
    assert "/" not in recipes.run_name(typed, 224, recipe.weights)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("someone/flowers-vit", "hf-hub:OWNER/NAME, or local-dir:FOLDER"),
        ("hf-hub:flowers", "hf-hub:OWNER/NAME"),
        ("local-dir:/nowhere", "/nowhere has no readable config.json"),
        ("hf-hub:", "hf-hub:OWNER/NAME"),
        ("timm/resnet51", "hf-hub:OWNER/NAME"),
    ],
)
def test_names_that_timm_does_not_take_are_refused_with_what_it_takes(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipes.find(name)


def test_a_model_in_a_folder_is_built_with_its_own_classes_and_pictures(tmp_path: Path) -> None:
    """As `export` or timm's push writes it; the path is typed relative to where the command runs."""
    model = timm.create_model("test_efficientnet", num_classes=7)
    timm.models.save_for_hf(model, tmp_path, model_config={"mean": (0.1, 0.2, 0.3)})
    name = recipes.find(f"local-dir:{tmp_path}").values["model"]["timm_name"]
    config = reading.parse(Config, {"model": {"name": name, "timm_name": name}, "data": {"res": "64"}})
    found = weights.open_model(config, [f"c{k}" for k in range(7)])
    assert torch.equal(found.classifier.weight, model.classifier.weight)
    assert preprocessing(name).train_res == 160


def test_names_resolve() -> None:
    assert recipes.find("l2").values["model"]["timm_name"] == "tf_efficientnet_l2.ns_jft_in1k_475"
    assert recipes.find("b4", "ap").values["data"]["res"] == "512"
    assert recipes.find("b4", "ns").values["data"]["res"] == "472"
    assert recipes.find("b8").weights == "ap"
    assert recipes.find("b0", "none").values["model"]["weights"] == "none"
    assert recipes.find("resnet50.a1_in1k").values["data"]["resize_rule"] == "timm"
    assert recipes.find("tf_efficientnet_b3.ap_in1k").values["data"]["resize_rule"] == "fixefficientnet"
    for arguments, words in (
        (("b9", ""), "'b8'"),
        (("resnet50", "ns"), "pretrained, none"),
        (("b8", "ns"), "ap, none"),
    ):
        with pytest.raises(UserError, match=words):
            recipes.find(*arguments)


def test_the_same_command_names_the_same_run() -> None:
    names = [
        recipes.run_name(*a)
        for a in (("l2", 600, "ns"), ("b0", 320, "ap"), ("b0", 320, str(Path("x/mine.pth"))), ("demo", 160, "none"))
    ]
    assert names == ["l2-600", "b0-320-ap", "b0-320-mine", "demo"]


def test_tuned_modules_in_a_plan_are_the_models() -> None:
    for name in ("b0", "b7", "demo"):
        recipe = recipes.find(name)
        assert recipe.facts is not None
        for policy in ("classifier", "classifier+bn", "classifier+bn+conv_head", "last_block"):
            with torch.device("meta"):
                model = build_model(recipe.values["model"]["timm_name"], 5)
            assert recipe.facts.tuned(policy) == ", ".join(policies.select(model, policy).modules)
    assert recipe.facts.tuned("classifier+bn_stats") == "classifier and statistics of bn2"


def test_a_command_for_every_recipe_stands_in_its_header() -> None:
    for recipe in [*recipes.every(), recipes.find("demo"), recipes.find("r50")]:
        file = recipe.name if recipe.name in recipes.FROM_SCRATCH else f"{recipe.name}_{recipe.weights}"
        header = (recipes.folder() / f"{file}.yaml").read_text()
        assert "python launch/submit.py" in header.splitlines()[0] + header.splitlines()[1]
        assert len(header.splitlines()) <= 25
        assert "our choice" in header.lower()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("four"), 2, 1, ("ash", "birch"))


@pytest.mark.parametrize("recipe", recipes.every(), ids=lambda r: f"{r.name}_{r.weights}")
def test_every_recipe_builds_at_its_resolution_and_runs_two_steps(
    recipe: recipes.Recipe, four: Path, tmp_path: Path
) -> None:
    """On the meta device at the published size; then two real steps and both evaluations at 64 px."""
    config = reading.parse(Config, recipe.values)
    with torch.device("meta"):
        parts = parts_of(build_model(config.model.timm_name, 1000), config.tune.policy)
        features = parts.trunk(torch.zeros(1, 3, config.data.res, config.data.res))
        assert parts.head(*features).shape == (1, 1000)
        assert features[0].shape[-1] == -(-config.data.res // 32)
    keys = [f"data.root={four}", "data.res=64", "data.workers=0", "model.weights=none", "tune.global_batch=2"]
    # The probe of memory formats would take longer than all the rest; tests/models/test_fast_trunk.py has it.
    keys.append("run.memory_format=contiguous")
    config = reading.parse(Config, reading.merge(recipe.values, reading.overrides([*keys, "run.log_every=1"])))
    preparation.prepare(tmp_path / "run", config, "test")
    assert worker.train(tmp_path / "run", StopFlag()) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "grad_norm" in line] == [1, 2]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert math.isfinite(results["before"]["loss"])
    assert math.isfinite(results["after"]["loss"])
    assert results["after"]["loss"] != results["before"]["loss"]
    shutil.rmtree(tmp_path / "run")  # two gigabytes for L2
