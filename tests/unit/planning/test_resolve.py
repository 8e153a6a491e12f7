"""What jobs.prune refuses, jobs.preflight and jobs.observe refuse in the same words, before anything is written."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from omegaconf import OmegaConf

import jobs.preflight
from helpers import configs
from helpers.paths import HELDOUT, TEXT
from stun.config import StunError
from stun.planning.job import resolve
from stun.pruning.evaluated import prune_then_evaluate
from stun.pruning.job import prune, take_statistics

# A name: the words on the command line, and what the error says. {tmp} is a folder with the files below.
BAD = {
    "ratios of no file": ("sparsify.ratios=/nonexistent.json", "sparsify.ratios=/nonexistent.json"),
    "ratios of too few layers": ("sparsify.ratios={tmp}/ratios.json", "a list of 3 numbers from 0 to 1 is needed"),
    "a pattern that the width does not hold": ("sparsify.pattern=3:7", "sparsify.pattern=3:7: .* not a multiple of 7"),
    "no pattern at all": ("sparsify.pattern=4:2", "sparsify.pattern=4:2"),
    "a pattern with ratios": ("sparsify.pattern=2:4 sparsify.ratios=owl", "keep ratios uniform"),
    "no such text": ("calibration.path=/nonexistent.jsonl", "calibration.path=/nonexistent.jsonl: no such file"),
    "no text": ("calibration.path=", "calibration.path="),
    "a text that is too short": ("calibration.path={tmp}/short.jsonl", "tokens, but 8 samples of calibration.length=32 need 256"),
    "a text of missing values": ("calibration.path={tmp}/missing.jsonl", "no text in field 'text'"),
    "a text with holes, too short": ("calibration.path={tmp}/holes.jsonl", r"\(1 of 2 rows have no value\), but 8 samples"),
    "a text of an unknown type": ("calibration.path={tmp}/text.xlsx", r"unknown file type; known: \.jsonl, .*\.csv"),
    "a text that is no gzip": ("calibration.path={tmp}/plain.csv.gz", "plain.csv.gz: datasets cannot load it: Not a gzipped"),
    "a table without the field": (
        "calibration.path={tmp}/table.csv",
        "field=text: .*table.csv has the fields body, n",
    ),
    "a folder without texts": ("calibration.path={tmp}/gguf", "gguf: a folder without files that can be read"),
    "a chat with the default field": ("calibration.path={tmp}/chat.jsonl", r"; did you mean calibration.field=messages\?"),
    "a chat of ShareGPT with the default field": ("calibration.path={tmp}/share.jsonl", "mean calibration.field=conversations"),
    "a pair with the default field": ("calibration.path={tmp}/pair.jsonl", "write prompt and completion into one field first"),
    "a field that is not there": ("calibration.field=nothing", "calibration.field=nothing"),
    "too few samples to hold any out": ("experts.fraction=auto calibration.samples=4", "8 are needed to hold some out"),
    "a target out of range": ("target=1.5", r"target=1.5: total sparsity lies in \[0, 1\)"),
    "a target that experts cannot meet": ("target=0.95 experts.fraction=1", "at most .* can be"),
    "a target that the scope cannot meet": ("target=0.9 experts.fraction=0 sparsify.scope=[attention]", "not reachable"),
    "a plan of no file": ("plan=/nonexistent.json", "/nonexistent.json"),
    "a plan that is none": ("plan={tmp}/ratios.json", "ratios.json"),
    "statistics of no folder": ("statistics=/nonexistent", "/nonexistent/stats: holds no complete statistics"),
    "an expert that is none": ("experts.protect.experts=[L9E1]", "names no expert"),
    "a source that is none": ("+experts.source_weights={{code:1}}", "experts.source_weights"),
    "no micro-batch": ("calibration.micro_batch=0", "calibration.micro_batch=0"),
    "no model": ("model.path=/nonexistent", "/nonexistent"),
    "a dense model": ("model.path={tmp}/dense", "'llama' is dense.*llm-compressor"),
    "a GGUF folder": ("model.path={tmp}/gguf", "model.path={tmp}/gguf: model.gguf: GGUF weights"),
    "a GGUF file": ("model.path={tmp}/gguf/model.gguf", "gguf/model.gguf: model.gguf: GGUF weights"),
    "an adapter": ("model.path={tmp}/adapter", "a LoRA adapter without its model"),
    "pickled weights": ("model.path={tmp}/pickled", "pytorch_model.bin: pickled weights"),
    "quantised weights": ("model.path={tmp}/quantised", r"weights are quantised \(quark\)"),
    "a model without a tokenizer": ("model.path={tmp}/mute", "{tmp}/mute: has no tokenizer; copy its files"),
    "a tokenizer without its vocabulary": ("model.path={tmp}/empty", r"the tokenizer of {tmp}/empty .* has \d tokens?,"),
    "a tokenizer of special tokens": ("model.path={tmp}/special", "the tokenizer of {tmp}/special makes 0 tokens"),
    "no model of experts": ("model.path={tmp}", "{tmp}"),
    "a project that W&B takes for none": ("tracking.project=a/b", "tracking.project=a/b"),
}
# What jobs.observe does not read: its statistics serve every target, plan and pattern.
UNREAD = ("pattern", "plan", "target", "statistics", "samples to hold")


FILES = {
    "ratios.json": [0.5],
    "short.jsonl": {"text": "too short"},
    "missing.jsonl": {"text": None},
    "holes.jsonl": '{"text": null}\n{"text": "too short"}\n',
    "text.xlsx": "text",
    "plain.csv.gz": "text\nnot packed\n",
    "table.csv": "body,n\nsome text,1\n",
    "chat.jsonl": {"messages": [{"role": "user", "content": "What?"}]},
    "share.jsonl": {"id": 1, "conversations": [{"from": "human", "value": "What?"}]},
    "pair.jsonl": {"prompt": "What?", "completion": "That."},
    "gguf/model.gguf": "GGUF",
    "adapter/adapter_config.json": {"peft_type": "LORA"},
    "adapter/adapter_model.safetensors": "",
    "pickled/config.json": {"model_type": "mixtral"},
    "pickled/pytorch_model.bin": "",
}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    return tmp_path


def without_tokenizer(source, folder):
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*token*"))


def empty_tokenizer(number):
    """As transformers makes it of `number` special tokens where vocab.json is missing: each text is its end alone."""

    def make(source, folder):
        without_tokenizer(source, folder)
        tokens = {str(i): {"content": f"<|{i}|>", "special": True} for i in range(number)}
        settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": tokens}
        settings |= {name: "<|0|>" for name in ("unk_token", "eos_token", "pad_token")}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    return make


def with_config(change):
    def make(source, folder):
        shutil.copytree(source, folder)
        (folder / "config.json").write_text(json.dumps(change(json.loads((folder / "config.json").read_text()))))

    return make


# Models made of a good one of Qwen3's family, of whose tokenizer transformers forgives everything.
MODELS = {
    "mute": without_tokenizer,
    "empty": empty_tokenizer(1),
    "special": empty_tokenizer(20),
    "dense": with_config(lambda config: {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3}),
    "quantised": with_config(lambda config: {**config, "quantization_config": {"quant_method": "quark"}}),
}


def composed(job: str, words: str, source, folder):
    usual = [f"model.path={source}", f"calibration.path={TEXT}", "calibration.samples=8", "calibration.length=32"]
    usual += ["target=0.4", f"run_dir={folder}/run"]
    return OmegaConf.to_object(configs.composed(job, [*usual, *words.format(tmp=folder).split()]))


def refusal(call) -> str:
    with pytest.raises(StunError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_the_same_words_everywhere(name, checkpoint, folder, ranks):
    words, says = BAD[name]
    source = checkpoint("mixtral")
    made = words.partition("model.path={tmp}/")[2]
    if made in MODELS:
        MODELS[made](checkpoint("qwen3_moe"), folder / made)
    before = sorted(file.name for file in folder.iterdir())
    pruning = refusal(lambda: prune(composed("prune", words, source, folder), ranks))
    assert refusal(lambda: jobs.preflight.work(composed("preflight", words, source, folder), ranks)) == pruning
    if not any(unread in name for unread in UNREAD):
        assert refusal(lambda: take_statistics(composed("observe", words, source, folder), ranks)) == pruning
    assert re.search(says.format(tmp=folder), pruning), pruning
    assert sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.parametrize(
    "words, says", [("task.path=/nonexistent.jsonl", "no such file"), ("dense=runs/dense.json", "task.path: a file or dataset")]
)
def test_preflight_asks_for_the_task_as_pruning_does(words, says, checkpoint, folder, ranks):
    source = checkpoint("mixtral")
    pruning = refusal(lambda: prune_then_evaluate(composed("prune", words, source, folder), ranks))
    assert refusal(lambda: jobs.preflight.work(composed("preflight", words, source, folder), ranks)) == pruning
    assert says in pruning
    jobs.preflight.work(composed("preflight", f"task.path={HELDOUT}", source, folder), ranks)


def test_a_good_request_is_resolved_once(checkpoint, folder, ranks):
    job = resolve(composed("prune", "experts.fraction=auto", checkpoint("mixtral"), folder), ranks)
    assert job.fractions and job.samples.tokens_ST.shape == (8, 32) and not job.is_finished
    split = job.with_fraction(0.5)
    assert split.cfg.experts.fraction == 0.5 and not split.fractions and sum(split.drops) > sum(job.drops)


def test_skipped_rows_are_a_line_in_the_log(checkpoint, folder, ranks, capsys):
    (folder / "text.jsonl").write_text('{"text": null}\n' + TEXT.read_text())
    job = resolve(composed("prune", "calibration.path={tmp}/text.jsonl", checkpoint("mixtral"), folder), ranks)
    said = capsys.readouterr().out
    assert said.count("have no value in field 'text'; they are skipped") == 1 and job.samples.tokens_ST.shape == (8, 32)
