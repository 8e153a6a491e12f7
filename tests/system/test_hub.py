"""Models by their names on the hub: what is fetched, by whom, when; what goes back; and one line where that cannot be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from helpers.hub_server import TOKEN, Hub, Repo
from helpers.launches import environment, settings
from helpers.paths import HELDOUT, ROOT, TEXT
from helpers.tensors import load_tensors, same_tensors
from helpers.warm import WarmProcess

pytestmark = pytest.mark.slow
CARD = "---\nlicense: mit\n---\n# The source\n"
BESIDE = {
    "README.md": CARD.encode(),
    "LICENSE": b"some terms",
    "chat_template.jinja": b"{{ messages }}",
    "tiktoken.model": b"a tokenizer",
    "tekken.json": b"{}",
    "modeling_mixtral.py": b"raise SystemExit('code of the checkpoint runs')",
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"the same weights again",
    "original/params.json": b"{}",
}
NEVER = {"modeling_mixtral.py", "pytorch_model.bin", "consolidated.safetensors", "original/params.json"}


@pytest.fixture(scope="module")
def hub(checkpoint):
    server = Hub()
    source = checkpoint("mixtral")
    server.add("tiny/mixtral", source, BESIDE)
    server.add("tiny/second", source)
    server.add("tiny/gated", source, is_gated=True)
    server.add("tiny/huge", source, claims={file.name: 10**15 for file in source.glob("*.safetensors")})
    server.repos["tiny/pickled"] = Repo()
    server.repos["tiny/pickled"].commit({"config.json": b"{}", "pytorch_model.bin": b"pickled"})
    yield server
    server.close()


@pytest.fixture(scope="module")
def env(hub, tmp_path_factory) -> dict[str, str]:
    """The environment of a machine with an empty cache, whose hub is this one."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_DISABLE_XET": "1"}
    inherited = {key: value for key, value in environment().items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return {**inherited, **own}


@pytest.fixture(scope="module")
def machine(env, tmp_path_factory):
    """Runs a job, or a file, on that machine."""
    process = WarmProcess(env, tmp_path_factory.mktemp("machine") / "socket", os.getpid())

    def run(script: str | Path, words: list[str] | None = None, ranks: int = 0, **more: str) -> subprocess.CompletedProcess:
        with TemporaryDirectory() as folder:
            start = [str(script)] if isinstance(script, Path) else ["-m", f"jobs.{script}"]
            return process.run([*start, *(words or [])], ranks, {**env, **more}, Path(folder))

    yield run
    process.end()


def commit(hub: Hub, name: str) -> str:
    return hub.repos[name].refs["main"]


@pytest.fixture(scope="module")
def pruned(hub, machine, tmp_path_factory) -> tuple[Path, str, list[tuple[str, str]]]:
    """The run folder of a model on the hub, what its launch said, and what was fetched."""
    run_dir, before = tmp_path_factory.mktemp("pruned") / "run", len(hub.fetched("tiny/mixtral"))
    done = machine("prune", settings("tiny/mixtral", run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout, hub.fetched("tiny/mixtral")[before:]


def test_preflight_reads_headers_alone(hub, machine, tmp_path):
    hub.repos["tiny/look"] = Repo()
    hub.repos["tiny/look"].commit(hub.repos["tiny/mixtral"].files)
    done = machine("preflight", [*settings("tiny/look", tmp_path / "run"), f"task.path={HELDOUT}"])
    assert done.returncode == 0 and "3 layers, 24 experts" in done.stdout and "are still to fetch" in done.stdout, done.stderr
    weights = [part for file, part in hub.fetched("tiny/look") if file.endswith(".safetensors")]
    assert weights and all(weights) and not (tmp_path / "run").exists()


def test_a_run_of_a_model_on_the_hub(hub, machine, checkpoint, pruned, tmp_path):
    run_dir, said, fetched = pruned
    sha = commit(hub, "tiny/mixtral")
    assert f"fetch tiny/mixtral@{sha}: " in said and said.index("disk ") < said.index(f"fetch tiny/mixtral@{sha}")
    assert {file for file, part in fetched if not part} == set(hub.repos["tiny/mixtral"].files) - NEVER
    assert machine("prune", settings(checkpoint("mixtral"), tmp_path / "local")).returncode == 0
    same_tensors(run_dir / "model", tmp_path / "local" / "model")
    record = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert record["config"]["model"] == {"path": f"tiny/mixtral@{sha}"}
    card = (run_dir / "model" / "README.md").read_text()
    assert "base_model: tiny/mixtral\n" in card and "Pruned from mixtral with" in card and sha not in card
    assert (run_dir / "model" / "SOURCE_README.md").read_text() == CARD
    assert {"LICENSE", "chat_template.jinja"} <= {file.name for file in (run_dir / "model").iterdir()}


def test_the_run_means_one_commit(hub, machine, pruned):
    """The name goes on with the same run while it means the same commit; the commit itself always does."""
    run_dir, repo, sha = pruned[0], hub.repos["tiny/mixtral"], commit(hub, "tiny/mixtral")
    for path in ("tiny/mixtral", "tiny/mixtral@main", f"tiny/mixtral@{sha}"):
        assert f"{run_dir} is complete already" in machine("prune", settings(path, run_dir)).stdout
    later = repo.commit({**repo.files, "README.md": b"# Changed\n"})
    refused = machine("prune", settings("tiny/mixtral", run_dir))
    assert refused.returncode == 2 and f"tiny/mixtral@{sha} there, tiny/mixtral@{later} now" in refused.stderr
    assert "complete already" in machine("prune", settings(f"tiny/mixtral@{sha}", run_dir)).stdout
    repo.refs["main"] = sha


@pytest.mark.ranks
def test_two_ranks_fetch_once(hub, machine, pruned, tmp_path):
    done = machine("prune", settings("tiny/second", tmp_path / "run"), ranks=2)
    assert done.returncode == 0 and done.stdout.count("fetch tiny/second@") == 1, done.stderr
    assert set(Counter(file for file, part in hub.fetched("tiny/second") if not part).values()) == {1}
    heads = Counter(path for method, path, *_ in hub.asked if method == "HEAD" and "tiny/second" in path)
    assert max(heads.values()) <= 2  # to learn the sizes, and to fetch
    same_tensors(tmp_path / "run" / "model", pruned[0] / "model")


def test_evaluate_beside_the_dense_model_of_the_hub(hub, machine, pruned, tmp_path):
    """Its result names the commit, with which the pruned model is compared later."""
    (tmp_path / "rows.jsonl").write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:2]))
    task = [f"task.path={tmp_path / 'rows.jsonl'}", "task.max_new_tokens=2"]
    dense, result = tmp_path / "dense.json", tmp_path / "result.json"
    assert machine("evaluate", ["model.path=tiny/mixtral", f"output={dense}", *task]).returncode == 0
    assert json.loads(dense.read_text())["model"] == f"tiny/mixtral@{commit(hub, 'tiny/mixtral')}"
    done = machine("evaluate", [f"model.path={pruned[0]}/model", f"dense={dense}", f"output={result}", *task])
    assert done.returncode == 0 and "kl" in json.loads(result.read_text())["agreement"], done.stderr


def test_every_other_job_takes_the_name(hub, machine, tmp_path):
    """Statistics, a plan from them, a comparison, and a benchmark that needs the tokenizer."""
    pinned, rows = f"tiny/mixtral@{commit(hub, 'tiny/mixtral')}", tmp_path / "rows.jsonl"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:2]))
    observed = machine("observe", settings("tiny/mixtral", tmp_path / "statistics"))
    assert f"observe {pinned} | 10 samples" in observed.stdout, observed.stderr
    plan = ["model.path=tiny/mixtral", f"run_dir={tmp_path / 'statistics'}", "target=0.4", "experts=stun"]
    plan.append(f"output={tmp_path / 'plan.json'}")
    assert "experts kept" in machine("plan", plan).stdout
    task = [f"task.path={rows}", "task.max_new_tokens=2"]
    assert machine("compare", [*settings("tiny/mixtral", tmp_path / "compared"), *task]).returncode == 0
    assert json.loads((tmp_path / "compared" / "comparison.json").read_text())["dense"]["model"] == pinned
    shape = ["shape.hidden=64", "shape.expert_width=32", "shape.layers=1", "shape.experts=4", "case=weights"]
    small = settings("tiny/mixtral", tmp_path / "benchmark", target=0.5)
    benchmark = machine("benchmark", [*small, *shape, "methods={wanda:[]}"])
    assert benchmark.returncode == 0 and (tmp_path / "benchmark" / "weights.json").is_file(), benchmark.stderr


MESSAGES = """
import json, sys
from stun.checkpoint import hub
from stun.config import ModelConfig, PruneConfig, StunError
from stun.runtime.ranks import Ranks

said = {}
for path in sys.argv[1:]:
    try:
        said[path] = hub.fetched(PruneConfig(ModelConfig(path)), Ranks()).model.path
    except StunError as error:
        said[path] = str(error)
print(json.dumps(said))
"""
REFUSED = {
    "tiny/none": "model.path=tiny/none: neither a folder here nor a model that the hub shows to you; check the name, .*",
    "tiny/mixtral@old": "model.path=tiny/mixtral@old: the hub has the model, but no such branch, tag or commit",
    "tiny/gated": "model.path=tiny/gated: is gated: accept its terms on http://[^ ]*/tiny/gated, then run `hf auth login`",
    "tiny/pickled": "model.path=tiny/pickled@.*: has no model.safetensors; only checkpoints of safetensors are read, .*",
    "tiny/huge": "model.path=tiny/huge@.* to fetch into .*, where .* are free; the variable HF_HOME names another place",
}


def said_of(machine, tmp_path, paths: list[str], **more: str) -> dict[str, str]:
    (tmp_path / "messages.py").write_text(MESSAGES)
    done = machine(tmp_path / "messages.py", paths, **more)
    assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_one_line_where_a_model_cannot_be_had(hub, machine, tmp_path):

    said = said_of(machine, tmp_path, list(REFUSED))
    for path, pattern in REFUSED.items():
        assert re.fullmatch(pattern, said[path]), said[path]
    assert not [file for file, part in hub.fetched("tiny/huge") if file.endswith(".safetensors")]
    allowed = said_of(machine, tmp_path, ["tiny/gated"], HF_TOKEN=TOKEN)
    assert allowed == {"tiny/gated": f"tiny/gated@{commit(hub, 'tiny/gated')}"}


def test_paths_never_go_to_the_hub(hub, machine, tmp_path):
    paths = ["./foo", "../foo/bar", "/data/x", "a/b/c", "foo", "~/foo", "stun/run", "a/b/"]
    before = len(hub.asked)
    assert said_of(machine, tmp_path, paths) == {path: path for path in paths}
    assert len(hub.asked) == before


def test_without_the_hub(hub, machine, pruned, tmp_path):
    """What is in the cache is used; the rest is refused in one line."""
    with hub.closed():
        said = said_of(machine, tmp_path, ["tiny/mixtral", "tiny/elsewhere"])
    assert said["tiny/mixtral"] == f"tiny/mixtral@{commit(hub, 'tiny/mixtral')}"
    assert "not, or not wholly, in" in said["tiny/elsewhere"] and "cannot be reached" in said["tiny/elsewhere"]
    assert "\n" not in said["tiny/elsewhere"]


OFFLINE = """
import json, sys
import stun

text, run_dir, *models = sys.argv[1:]
settings = {"calibration": {"path": text, "samples": 10, "length": 48, "micro_batch": 2}, "target": 0.4}
summary = stun.prune(models[0], output=run_dir, experts="stun", sparsify="wanda", **settings)
said = {"source": summary["source"]}
for model in models[1:]:
    try:
        said[model] = type(stun.load(model)[0]).__name__
    except stun.StunError as error:
        said[model] = str(error)
print(json.dumps(said))
"""


def by_hand(cache: Path, name: str, source: Path, weights: Path | None = None) -> None:
    """A model in the cache as other programs leave it: blobs, links, a ref and no list of the files; `weights`: a folder for the
    blobs of weights, which the blobs link to, as in the store that models share."""
    model, sha = cache / f"models--{name.replace('/', '--')}", "a" * 40
    for folder in (model / "blobs", model / "snapshots" / sha, model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(sha)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = model / "blobs" / f"{number:040x}"
        if weights and file.suffix == ".safetensors":
            weights.mkdir(parents=True, exist_ok=True)
            (weights / blob.name).write_bytes(file.read_bytes())
            blob.symlink_to(f"../../{(weights / blob.name).relative_to(cache)}")
        else:
            blob.write_bytes(file.read_bytes())
        (model / "snapshots" / sha / file.name).symlink_to(f"../../blobs/{blob.name}")


def test_offline(hub, env, pruned, checkpoint, tmp_path):
    """HF_HUB_OFFLINE, through the Python API: the same run of what an earlier job has fetched, and caches made by hand."""
    cache, source = Path(env["HF_HOME"]) / "hub", checkpoint("mixtral")
    by_hand(cache, "hand/made", source)
    by_hand(cache, "hand/shared", source, cache / "blobs" / "ab")
    by_hand(cache, "hand/partial", source)
    next((cache / "models--hand--partial/snapshots").glob("*/model-00002*")).unlink()
    before = len(hub.asked)
    models = ["tiny/mixtral", "hand/made", "hand/shared", "hand/partial", "tiny/elsewhere"]
    command = [sys.executable, "-c", OFFLINE, str(TEXT), str(tmp_path / "run"), *models]
    done = subprocess.run(
        command, cwd=tmp_path, env={**env, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    same_tensors(tmp_path / "run" / "model", pruned[0] / "model")
    assert said["source"] == f"tiny/mixtral@{commit(hub, 'tiny/mixtral')}"
    assert said["hand/made"] == said["hand/shared"] == "MixtralForCausalLM"
    for model in ("hand/partial", "tiny/elsewhere"):
        assert said[model].endswith(f"not, or not wholly, in {cache}, and HF_HUB_OFFLINE is set"), said[model]
    assert len(hub.asked) == before


def test_a_checkpoint_is_pushed(hub, machine, pruned):
    """That of a finished run, to a new private repository; once more without sending its weights; and nothing says the token."""
    run_dir = pruned[0]
    command = [*settings("tiny/mixtral", run_dir), "push_to=you/pruned"]
    done = machine("prune", command, HF_TOKEN=TOKEN)
    assert done.returncode == 0 and f"pushed to {hub.url}/you/pruned" in done.stdout, done.stderr
    files = {file.name: file.read_bytes() for file in (run_dir / "model").iterdir()}
    repo = hub.repos["you/pruned"]
    assert repo.visibility == "private" and {name: repo.files[name] for name in files} == files
    stored = [path for method, path, *_ in hub.asked if method == "PUT"]
    again = machine("prune", command, HF_TOKEN=TOKEN)
    assert again.returncode == 0 and stored == [path for method, path, *_ in hub.asked if method == "PUT"]
    written = b"".join(file.read_bytes() for file in run_dir.rglob("*") if file.is_file())
    assert TOKEN not in "".join((done.stdout, done.stderr, again.stdout, again.stderr)) and TOKEN.encode() not in written


def test_a_repository_whose_own_files_would_be_loaded(hub, machine, pruned):
    """transformers takes model.safetensors before an index."""
    others, command = {"model.safetensors": b"dense", "hf_quant_config.json": b"{}"}, settings("tiny/mixtral", pruned[0])
    hub.repos["you/other"] = Repo()
    hub.repos["you/other"].commit(others)
    done = machine("prune", [*command, "push_to=you/other"], HF_TOKEN=TOKEN)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "push_to=you/other: holds hf_quant_config.json, model.safetensors, which" in line
    assert hub.repos["you/other"].files == others


@pytest.mark.ranks
def test_a_failed_push_leaves_the_run(machine, pruned):
    """... and is one line, whatever the number of ranks."""
    run_dir, before = pruned[0], load_tensors(pruned[0] / "model").keys()
    command = [*settings("tiny/mixtral", run_dir), "push_to=you/refused"]
    done = machine("prune", command, ranks=2, HF_TOKEN="hf_" + "N" * 34)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: push_to=you/refused: this login may not write there")
    again = f"stun prune {' '.join(command)}"
    assert line.endswith(f"{run_dir}/model is complete, and the same command pushes it again: {again}")
    assert (run_dir / "manifest.json").is_file() and load_tensors(run_dir / "model").keys() == before
    (run_dir / "model").rename(run_dir / "elsewhere")
    gone = machine("prune", command, HF_TOKEN="hf_" + "N" * 34)
    (run_dir / "elsewhere").rename(run_dir / "model")
    assert gone.returncode == 2 and "model has no model.safetensors.index.json; remove " in gone.stderr


@pytest.mark.parametrize(
    "name, token, says",
    [
        ("you/new", "", "no login: run `hf auth login`, or set HF_TOKEN"),
        ("you", TOKEN, "a repository on the hub is needed"),
        ("you/a/b", TOKEN, "a repository on the hub is needed"),
        ("tiny/mixtral", TOKEN, "is the model to prune"),
    ],
)
def test_a_push_that_cannot_be_is_refused_first(hub, machine, tmp_path, name, token, says):
    asked, more = len(hub.asked), {"HF_TOKEN": token} if token else {}
    done = machine("prune", [*settings("tiny/mixtral", tmp_path / "run"), f"push_to={name}"], **more)
    assert done.returncode == 2 and f"error: push_to={name}: {says}" in done.stderr
    assert len(hub.asked) == asked and not (tmp_path / "run").exists()


def test_other_jobs_do_not_push(machine, checkpoint, tmp_path):
    words = [*settings(checkpoint("mixtral"), tmp_path / "run"), "push_to=you/new"]
    assert "statistics are not uploaded" in machine("observe", words).stderr
    assert "push_to" in machine("compare", words).stderr
    sweep = machine("prune", ["-m", *words, "experts.fraction=0.1,0.2"])
    assert sweep.returncode == 2 and "one repository does not hold the runs of a sweep" in sweep.stderr
    assert not (tmp_path / "run").exists()
