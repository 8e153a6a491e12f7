"""The code beside a checkpoint with different numbers of experts: what programs without this package load."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.selections import config
from helpers.stock import load_stock
from helpers.tensors import same_tensors
from helpers.uneven import pruned, steep
from helpers.zoo import FAMILIES, SHAPE, randomise
from stun.checkpoint.reader import Checkpoint
from stun.config import Budget, Dropped, ExpertsConfig, Scope, SparsifyConfig, StunError
from stun.model import remote_code
from stun.model.architecture import Architecture
from stun.model.tensor_names import experts_of
from stun.planning.job import resolve_model

PROMPT = list(range(3, 20))
# A process that has transformers and not this package.
WITHOUT_STUN = """
import inspect
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

folders, prompt = [Path(folder) for folder in sys.argv[1:]], torch.arange(3, 20)[None]
for folder in folders:
    options = {"dtype": torch.float32, "trust_remote_code": True, "experts_implementation": "eager"}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    base = AutoModel.from_pretrained(folder, **options)
    with torch.no_grad():
        answers = {"logits": model(prompt).logits, "hidden": base(prompt, use_cache=False).last_hidden_state}
        answers["again"] = model.lm_head(answers["hidden"])
    if "output_router_logits" in inspect.signature(model.forward).parameters:
        answers["aux_loss"] = model(prompt, output_router_logits=True).aux_loss
    answers["tokens"] = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    save_file({name: tensor.contiguous() for name, tensor in answers.items()}, folder / "answers.bin")
    model.save_pretrained(folder / "saved", max_shard_size="60KB")
assert "stun" not in sys.modules
"""


def without_stun(tmp_path, *folders) -> subprocess.CompletedProcess:
    script = tmp_path / "without_stun.py"
    script.write_text(WITHOUT_STUN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-P", str(script), *map(str, folders)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


def uneven(folder, family):
    """A random checkpoint with 4 and 8 experts in turn."""
    shape = {**SHAPE, **FAMILIES[family]}
    layers = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).base_model.layers
    counts = [(4, 8)[index % 2] if experts_of(layer) else 0 for index, layer in enumerate(layers)]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(f"stun_{family}", **shape, experts_per_layer=counts))
    randomise(model)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.mark.slow
def test_every_family_loads_in_a_process_without_this_package(tmp_path):
    folders = [uneven(tmp_path / family, family) for family in FAMILIES if family != "arctic"]
    done = without_stun(tmp_path, *folders)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        answers, model = load_file(folder / "answers.bin"), load_stock(folder)
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT])).logits
        torch.testing.assert_close(answers["logits"], logits, msg=lambda text, folder=folder: f"{folder.name}: {text}")
        assert torch.isfinite(answers["again"]).all()
        if "aux_loss" in answers:
            aux_loss = model(torch.tensor([PROMPT]), output_router_logits=True).aux_loss
            torch.testing.assert_close(answers["aux_loss"], aux_loss)
        tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(answers["tokens"], tokens), folder.name
        same_tensors(folder, folder / "saved")
        assert (folder / "saved" / remote_code.FILE).read_text() == (folder / remote_code.FILE).read_text()
        text = (folder / remote_code.FILE).read_text()
        assert len(text.splitlines()) < 70 and "import stun" not in text and "from stun" not in text


@pytest.mark.slow
def test_a_run_writes_it_and_takes_it_away_again(tmp_path, ranks):
    source = steep(tmp_path / "source", "mixtral")
    folder, _ = pruned(source, tmp_path / "run", ranks, target=0.199, sparsify=SparsifyConfig(scope=[Scope.experts]))
    assert json.loads((folder / "config.json").read_text())["auto_map"].keys() == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }
    done = without_stun(tmp_path, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(
        load_file(folder / "answers.bin")["logits"], load_stock(folder)(torch.tensor([PROMPT])).logits, rtol=1e-4, atol=1e-4
    )
    level = ExpertsConfig(keep=2, budget=Budget.uniform)
    flat, _ = pruned(folder, tmp_path / "level", ranks, target=None, experts=level)
    assert "auto_map" not in json.loads((flat / "config.json").read_text()) and not (flat / remote_code.FILE).exists()
    load_stock(flat)


def test_novices_of_an_uneven_checkpoint_are_refused(tmp_path):
    source = uneven(tmp_path / "model", "mixtral")
    with pytest.raises(StunError, match="layers have different numbers of experts already"):
        resolve_model(config(source, tmp_path / "run", experts=ExpertsConfig(dropped=Dropped.novice)))


@pytest.mark.slow
def test_this_package_takes_its_own_classes(tmp_path):
    """The code is not even read, whatever a caller passes."""
    folder = uneven(tmp_path / "model", "mixtral")
    (folder / remote_code.FILE).write_text("raise SystemExit('was run')")
    assert len(Architecture(Checkpoint.open(folder)).layers) == 3
    for trusted in (None, False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted)
        assert type(model).__module__ == "stun.model.heterogeneous"


def test_names_of_code_that_is_not_there_go(tmp_path):
    """No code is fetched from the hub."""
    (tmp_path / "modeling_y.py").touch()
    lost, own, elsewhere = ({"AutoConfig": name} for name in ("configuration_x.X", "modeling_y.Y", "somebody/model--z.Z"))
    assert remote_code.without_missing(tmp_path, {"a": 1, "auto_map": lost}) == {"a": 1}
    for kept in (own, elsewhere, remote_code.auto_map("mixtral"), "odd"):
        assert remote_code.without_missing(tmp_path, {"auto_map": kept}) == {"auto_map": kept}
    both = {"auto_map": {**own, "AutoTokenizer": ["tokenizer_x.Slow", None]}}
    assert remote_code.without_missing(tmp_path, both) == {"auto_map": own}


def test_only_for_what_it_describes(tmp_path):
    for content in ({}, {"model_type": "stun_mixtral"}, {"model_type": "mixtral", "auto_map": remote_code.auto_map("mixtral")}):
        remote_code.write_code(tmp_path, content)
        assert not (tmp_path / remote_code.FILE).exists()
