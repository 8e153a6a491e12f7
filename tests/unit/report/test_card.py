"""The model card: what the hub reads of it, and what it must not tell."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from helpers.large_runs import make_run
from helpers.selections import config
from helpers.zoo import make_checkpoint
from stun.config import Budget, ExpertsConfig
from stun.model.runtimes import runtimes
from stun.pruning.job import prune
from stun.pruning.summary import command_line
from stun.report.model_card import SOURCE_CARD, _code, _what_was_removed, without_folders, write_card
from stun.report.tables import summary_table
from stun.report.write import write_reports

# Of the hub's metadata (huggingface.co/docs/hub/model-cards), what a card here may hold.
FIELDS = {"base_model", "library_name", "pipeline_tag", "tags", "license", "license_name", "license_link", "language"}
SOURCE = "---\nlicense: other\nlicense_name: some-terms\nlicense_link: LICENSE\nlanguage:\n- en\nbase_model: x/y\n---\n# Terms\n"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, ranks):
    """A run whose source has a card, in the hub's cache."""
    folder = tmp_path_factory.mktemp("card")
    source = make_checkpoint(folder / "models--some-org--Mixtral-9.1/snapshots/0123abc", "mixtral")
    (source / "README.md").write_text(SOURCE)
    (source / "LICENSE").write_text("some terms")
    prune(config(source, folder / "run"), ranks)
    return folder / "run"


def test_metadata(pruned):
    card = ModelCard.load(pruned / "model" / "README.md")
    metadata = card.data.to_dict()
    assert metadata.keys() <= FIELDS and card.data.base_model == "some-org/Mixtral-9.1"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"stun", "pruning", "mixtral"} <= set(card.data.tags)
    passed_on = {key: metadata[key] for key in ("license", "license_name", "license_link", "language")}
    assert passed_on == {"license": "other", "license_name": "some-terms", "license_link": "LICENSE", "language": ["en"]}
    assert (pruned / "model" / SOURCE_CARD).read_text() == SOURCE and "# Terms" not in card.text


def test_text_says_what_was_done_and_no_more(pruned):
    text = (pruned / "model" / "README.md").read_text()
    summary = json.loads((pruned / "manifest.json").read_text())["summary"]
    for said in (
        "40% pruned",
        "## Sparsity",
        "| experts |",
        f"| {summary['nonzero']:,} |",
        "8 samples of 40 tokens",
        "from_pretrained",
    ):
        assert said in text
    assert f"{sum(summary['kept'])} of 24 kept" in text and "## Evaluation" not in text
    assert str(pruned.parent) not in text and "/tmp" not in text and "calibration.jsonl" in text


@pytest.mark.slow
def test_evaluation_comes_with_the_report(pruned):
    """... and leaves the rest as it was."""
    before = (pruned / "model" / "README.md").read_text()
    (pruned / "result.json").write_text(
        json.dumps({"average": 0.75, "perplexity": 2.5, "rows": 1200, "tokens": 9, "dense": {"average": 1.0}})
    )
    write_reports(pruned)
    after = (pruned / "model" / "README.md").read_text()
    assert "| exact match, average | 1 | 0.75 |" in after and "Over 1,200 questions and 9 predicted tokens." in after
    assert after.replace(after[after.index("## Evaluation") : after.index("## How to load")], "") == before
    (pruned / "result.json").unlink()


def test_a_command_may_hold_a_fence():
    command = "stun prune 'run_dir=a\n```\n# Title\n````'"
    assert _code(command) == f"`````sh\n{command}\n`````"


def test_the_folder_can_be_uploaded(pruned, monkeypatch):
    """The hub's own selection of files and preparation of a commit; only the hub itself is not asked about the metadata."""
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)
    additions = HfApi()._prepare_upload_folder_additions(pruned / "model", "", ignore_patterns=[".git"])
    assert all(isinstance(added, CommitOperationAdd) and added.upload_info.size > 0 for added in additions)
    names = {added.path_in_repo for added in additions}
    assert {"README.md", SOURCE_CARD, "LICENSE", "config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    shards = set(json.loads((pruned / "model" / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert names - {name for name in names if not name.endswith(".safetensors")} == shards


def test_layers_that_differ_need_trust(checkpoint, tmp_path, ranks):
    experts = ExpertsConfig(budget=Budget["global"])
    prune(config(checkpoint("mixtral", num_local_experts=12), tmp_path / "run", experts=experts), ranks)
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert card.data.library_name == "transformers" and "trust_remote_code=True)" in card.text and card.data.base_model is None


@pytest.mark.slow
@pytest.mark.parametrize("model_type, kept", [("arctic", [6, 6]), ("mixtral", [6, 5]), ("mixtral", [6, 6])])
def test_what_loads_it_is_said_once(tmp_path, model_type, kept):
    """The run's summary, its page and the card use the same words; the card's code is what they say."""
    run = make_run(tmp_path / "run", 2, 8)
    summary = json.loads((run / "manifest.json").read_text())["summary"]
    summary |= {"loads_in": runtimes(f"{model_type.title()}ForCausalLM", kept), "model_type": model_type, "kept": kept}
    (run / "manifest.json").write_text(json.dumps({"summary": summary}))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    page = unescape(write_reports(run)[0].read_text()).replace("<wbr>", "")
    card, table = (run / "model" / "README.md").read_text().replace("\\", ""), summary_table(summary, "r")
    for runtime, answer in summary["loads_in"].items():
        assert f"<td>loads in {runtime}</td><td>{answer}</td>" in page and f"- loads in {runtime}: {answer}\n" in card
        assert re.search(rf"^loads in {runtime} +{re.escape(answer)}$", table, re.M)
    assert ("\nimport stun " in card) is ("import stun" in summary["loads_in"]["transformers"])
    assert (", trust_remote_code=True)" in card) is ("trust_remote_code" in summary["loads_in"]["transformers"])


@pytest.mark.parametrize(
    "source",
    [
        b"---\nlicense: [\n---\n",
        b"---\nlicense: !!python/object/apply:os.system ['touch hostile']\n---\n",
        b"---\nlicense: |\n  mit\n  ---\n  # A title\nlanguage: {a: b}\n---\n",
        b"\xff\xfe\x00",
        b"---\na: &a [x]\nlicense: *a\n---\n",
    ],
)
def test_cards_of_sources_are_not_trusted(tmp_path, source):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / SOURCE_CARD).write_bytes(source)
    summary = {"sparsity": 0.5, "kept": [4], "experts": [8], "ratio": 0.1, "parameters": 9, "nonzero": 5, "source": "a\n# b|<i>"}
    card = ModelCard.load(write_card(tmp_path, summary, {"calibration": {"path": "x`|y"}}, {}, {}))
    assert not {"license", "language"} & card.data.to_dict().keys()
    assert "\n# b" not in card.text and "<i>" not in card.text.replace("\\<i\\>", "") and not (tmp_path / "hostile").exists()


def test_what_left_the_model():
    """No more is claimed than was done."""
    for kept, ratio, said in (
        (4, 0.1, "whole experts first, then single weights"),
        (8, 0.1, "single weights"),
        (4, 0.0, "whole experts"),
    ):
        assert _what_was_removed({"kept": [kept], "experts": [8], "ratio": ratio}) == said


def test_commands_hold_no_secrets():
    secrets = ["+hub_token=abc", "key=hf_" + "a" * 30, "p=https://me:pw@host/x"]
    words = ["/x/jobs/prune.py", "model.path=/data/a b", *secrets, "task.max_new_tokens=4"]
    text = command_line(words)
    assert text.startswith("stun prune 'model.path=/data/a b'") and "task.max_new_tokens=4" in text
    assert not any(secret in text for secret in ("abc", "hf_a", "me:pw"))
    assert command_line(["/usr/bin/pytest", "-q"]) == "pytest -q"


def test_commands_without_folders():
    command = "python model.path=/data/x/qwen3 'a={b:{path:/home/me/c.jsonl,w:1}}' run_dir=runs/y ../z ~/t plan=/p.json"
    assert without_folders(command) == "python model.path=qwen3 'a={b:{path:c.jsonl,w:1}}' run_dir=runs/y ../z t plan=p.json"
