"""Every case on tiny shapes: what it says of bytes, FLOP and phases is counted by hand here."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from helpers.configs import composed
from helpers.launches import run_warm
from helpers.pages import launched
from helpers.paths import ROOT, TEXT
from stun.benchmark.against_peers import AS_IT_COMES, Bench
from stun.benchmark.cases import benchmark
from stun.benchmark.checkpoints import arctic, bytes_of, qwen3_moe, write_checkpoint
from stun.benchmark.config import BenchmarkCase, CheckpointShape
from stun.benchmark.processes import digests, run_alone, run_peer
from stun.benchmark.table import benchmark_table
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError

D, I, E, K, V, LENGTH, SAMPLES = 128, 64, 8, 2, 512, 32, 6
TOKENS = LENGTH * SAMPLES
CPU = torch.device("cpu")
SHAPE = CheckpointShape(hidden=D, expert_width=I, experts=E, top_k=K, layers=1, vocabulary=V)


def request(case: str, run_dir, *overrides: str):
    """The configuration of a case on the tiny shape."""
    model, shape = f"model.path={ROOT / 'stun/reference/model'}", [f"shape.hidden={D}", f"shape.expert_width={I}"]
    text = [f"calibration.path={TEXT}", f"calibration.samples={SAMPLES}", f"calibration.length={LENGTH}"]
    small = [model, *shape, f"shape.experts={E}", f"shape.top_k={K}", "shape.layers=1", *text, "calibration.micro_batch=2"]
    return OmegaConf.to_object(composed("benchmark", [f"case={case}", *small, f"run_dir={run_dir}", *overrides]))


@pytest.fixture
def warm(monkeypatch):
    """What this interpreter runs need not import the package first (helpers.warm). test_peers.py starts peers as they are, and
    runs/test_world.py launches."""

    def warmly(command, *where, **variables):
        if command[0] != sys.executable:
            return run_alone(command, *where, **variables)
        start = time.perf_counter()
        done = run_warm(*(launched(command) if "-m" in command else (command[1:], 0)), check=False)
        return done, time.perf_counter() - start

    monkeypatch.setattr("stun.benchmark.processes.run_alone", warmly)


def measured(case: str, run_dir, ranks, *overrides: str, **changes) -> dict:
    """What a case leaves in its file, which is all that it leaves; its table can be printed."""
    result = benchmark(replace(request(case, run_dir, *overrides), **changes), ranks)
    (file,) = run_dir.iterdir()
    content = json.loads(file.read_text())
    assert file.name == f"{case}.json" and content == json.loads(json.dumps(result))
    assert content["cores"] >= 1 and content["torch"] == torch.__version__ and re.match(r"20\d\d-\d\d-\d\dT", content["date"])
    assert content["device"] in benchmark_table(content)
    return content


def test_layer(tmp_path, ranks):
    """Every phase has its bytes or FLOP; all but the experts, and the five of them that stay, are written."""
    found = measured("layer", tmp_path / "run", ranks, "depth=10")
    phases = found["phases"]
    dense = 4 * D * D + 3 * D * D  # attention with as many heads for keys as for queries; the MLP beside the experts
    rest, expert, router = 3 * D, 3 * D * I, D  # norms; one expert and its row of the router
    flop = 2 * (dense + E * router + K * expert + LENGTH * D) * TOKENS
    drop = round(0.4 * 0.5 * (dense + rest + E * (expert + router)) / (expert + router))
    assert (
        list(phases) == ["read", "plain", "observe", "select", "records", "measure", "mask", "propagate", "write"] and drop == 3
    )
    assert all(phases[name]["flop"] == flop for name in ("plain", "observe", "propagate"))
    assert phases["measure"]["flop"] == flop - 2 * K * D * I * TOKENS  # without the experts' last matrices
    assert phases["read"]["bytes"] == 2 * (dense + rest + E * (expert + router))
    assert phases["write"]["bytes"] == 2 * (dense + rest + (E - drop) * (expert + router))
    assert phases["mask"]["bytes"] == 2 * 2 * (dense + (E - drop) * expert)
    for row in phases.values():
        amount = row.get("flop", row.get("bytes"))
        assert row["seconds"] > 0 and row["limit"] == amount / found["rates"][row["rate"]] > 0
        assert row["ratio"] == row["seconds"] / row["limit"]
    seconds = {name: row["seconds"] for name, row in phases.items()}
    compute = sum(seconds[name] for name in ("observe", "select", "records", "measure", "mask", "propagate"))
    assert found["seconds_without_storage"] == pytest.approx(10 * compute)
    assert found["seconds_with_storage"] >= found["seconds_without_storage"] * 0.999
    assert found["observe_to_plain"] == seconds["observe"] / seconds["plain"] and 0 < found["mask_share"] < 1
    assert found["tokens"] == TOKENS and found["dtype"] in ("float32", "bfloat16") and found["peak_bytes"] > 0


def test_layer_by_magnitude(tmp_path, ranks):
    """What reads no inputs has nothing to measure, and no limit for it."""
    found = measured("layer", tmp_path / "run", ranks, "sparsify.method=magnitude")
    assert found["phases"]["measure"].keys() == {"seconds"} and found["phases"]["mask"]["limit"] > 0


@pytest.mark.slow
def test_io(tmp_path, ranks):
    """Every operation beside a bare loop; more threads beside one; all of the file."""
    found = measured("io", tmp_path / "run", ranks, "threads=[1,2]")
    assert list(found["runs"]) == ["1", "2"] and 0 < found["bytes"] - bytes_of(qwen3_moe(SHAPE)) < 10_000
    for row in found["runs"].values():
        assert list(row) == ["read", "write", "write with its checksum"]
        assert all(cell["rate"] > 0 and cell["ratio"] == cell["rate"] / cell["bare"] for cell in row.values())
        assert row["write"]["bare"] == row["write with its checksum"]["bare"]
    assert found["dd"].keys() == {"read", "write"} and min(found["dd"].values()) > 0
    assert "nvfp4" in found["forms"]
    assert all(0 < row["ratio"] == row["seconds"] / row["bfloat16"] for row in found["forms"].values())


def test_weights(tmp_path, ranks):
    found = measured("weights", tmp_path / "run", ranks, methods={"magnitude": ["sparsify.method=magnitude"], "wanda": []})
    assert list(found["methods"]) == ["magnitude", "wanda"] and found["bytes"] == bytes_of(qwen3_moe(SHAPE))
    assert all(abs(row["sparsity"] - 0.5) < 1e-3 and row["seconds"] > 0 for row in found["methods"].values())


@pytest.mark.slow
def test_growth(tmp_path, ranks, warm):
    """Twice the layers, experts or tokens: FLOP and bytes grow as they must."""
    found = measured("growth", tmp_path / "run", ranks, "factors=[2]")
    runs = found["runs"]
    assert list(runs) == ["base", "2 x layers", "2 x experts", "2 x tokens"] and runs["base"]["cost"] == 1
    attention = 2 * D * D + 2 * D * 64  # one head for keys and values, of width 64

    def flop(experts: int, layers: int) -> int:
        """Observed, measured without the experts' last matrices, and run once pruned where another layer follows."""
        whole = 2 * (attention + experts * D + K * 3 * D * I + LENGTH * D) * TOKENS
        return layers * (2 * whole - 2 * K * D * I * TOKENS) + (layers - 1) * whole

    assert [row["flop"] for row in runs.values()] == [flop(E, 1), flop(E, 2), flop(2 * E, 1), 2 * flop(E, 1)]
    for (_, row), shape in zip(
        runs.items(), (SHAPE, replace(SHAPE, layers=2), replace(SHAPE, experts=2 * E), SHAPE), strict=True
    ):
        whole, outside = bytes_of(qwen3_moe(shape)), 2 * (2 * V * D + D)
        assert whole - outside + 2 * V * D < row["bytes_read"] - outside <= 2 * whole - outside
        assert 0.5 * whole < row["bytes_written"] < whole
        assert row["limit"] == max(row["limits"].values()) > 0 and row["ratio"] == row["seconds"] / row["limit"]
        assert row["peak_bytes"] > 0 and row["wall_seconds"] > row["seconds"]


@pytest.mark.ranks
@pytest.mark.slow
def test_ranks(tmp_path, ranks, warm):
    found = measured("ranks", tmp_path / "run", ranks, "worlds=[1,2]")
    one, two = found["runs"]["1"], found["runs"]["2"]
    assert found["identical"] and one["sha256"] == two["sha256"] and one["tensors"] == two["tensors"] > 3 * K
    assert one["speed_up"] == 1 and two["speed_up"] == one["seconds"] / two["seconds"]


@pytest.mark.slow
def test_depth(tmp_path, ranks, warm):
    found = measured("depth", tmp_path / "run", ranks, "depths=[2]")
    (row,) = found["runs"].values()
    assert list(found["runs"]) == ["2"] and list(row["streams"]) == ["observe", "prune"] and row["peak_bytes"] > 0
    for name, stream in row["streams"].items():
        assert stream["total"] == sum(row["phases"][name].values())
        assert stream["ratio"] == stream["total"] / max(stream[phase] for phase in ("read", "compute", "write")) > 0


def program(file, script: str) -> str:
    """A program that runs a shell script."""
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.slow
def test_peers(tmp_path, ranks, warm):
    """All tools reach the target and keep as many experts; llm-compressor fails, having been asked for what STUN has reached."""
    python = program(tmp_path / "python", 'echo trying >&2; echo "ImportError: $5 $6 $7" >&2; echo "now gone" >&2; exit 1')
    found = measured("peers", tmp_path / "run", ranks, f"peers.llmcompressor={python}", "depths=[2]")
    forwards, prunes = ("forward", "forward, float32"), {"wanda": (1, E), "reap + wanda": (1, E - 2), "wanda, 2 layers": (2, E)}
    assert found["tokens"] == TOKENS and list(found["tasks"]) == [*forwards, *prunes]
    for task in forwards:
        stun, transformers = found["tasks"][task].values()
        assert transformers["tokens"] == TOKENS and transformers["seconds"] == transformers["phases"]["forward"]
        assert transformers["ratios"]["seconds"] == transformers["seconds"] / stun["seconds"] > 0
        assert stun["peak_bytes"] > 0 and "wall_seconds" not in stun["ratios"]
    assert found["tasks"][forwards[1]]["STUN"]["dtype"] == "float32"
    for task, (layers, left) in prunes.items():
        rows = found["tasks"][task]
        assert list(rows) == ["STUN", "llm-compressor", *([AS_IT_COMES] if task.startswith("wanda") else []), "naive"]
        for name in ("STUN", "naive"):
            row = rows[name]
            assert row["sparsity"] == pytest.approx(0.5, abs=0.01) and row["experts"] == [left] * layers
            assert row["wall_seconds"] > row["seconds"] > 0 and row["peak_bytes"] > 0
            assert row["ratios"] == {key: row[key] / rows["STUN"][key] for key in ("seconds", "wall_seconds", "peak_bytes")}
        phases = rows["naive"]["phases"]
        assert rows["naive"]["seconds"] == pytest.approx(sum(phases.values()) - phases["load"])
        method, ratio, share = rows["llm-compressor"].pop("reason").removeprefix("failed: ImportError: ").split()
        assert not rows["llm-compressor"] and method == ("wanda" if left == E else "reap+wanda") and float(share) == 1 - left / E
        assert float(ratio) == pytest.approx(rows["naive"]["row_sparsity"], abs=1e-4)


def test_without_an_interpreter_llmcompressor_is_not_run(tmp_path, ranks):
    cfg = request("peers", tmp_path)
    row = Bench(cfg, cfg.shape, tmp_path, ranks).llmcompressor("wanda", 0.5, 0.0)
    assert row == {"reason": "not run: peers.llmcompressor names no interpreter"}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "it ended with status 3"),
        ("kill -9 $$", "it ended with status -9"),
        ("echo cannot go on >&2; exit 1", "cannot go on"),
        ("echo 'a.BadError: of this' >&2; echo 'and more' >&2; exit 1", "a.BadError: of this"),
        ("echo done", "its last line is no report"),
        ("true", "its last line is no report"),
        ("""echo '{"seconds": 1, "peak_bytes": 1}'""", "its last line is no report"),
    ],
)
def test_a_peer_that_fails_says_why(tmp_path, script, reason):
    assert run_peer(program(tmp_path / "python", script), "naive", tmp_path, CPU) == {"reason": f"failed: {reason}"}


def test_a_peer_that_cannot_start_says_why(tmp_path):
    (tmp_path / "python").touch()
    assert "Permission denied" in run_peer(str(tmp_path / "python"), "naive", tmp_path, CPU)["reason"]


def test_a_peer_computes_where_stun_does(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    script = """echo "{\\"seconds\\": {}, \\"peak_bytes\\": 0, \\"visible\\": \\"$CUDA_VISIBLE_DEVICES\\"}\""""
    python = program(tmp_path / "python", script)
    found = [run_peer(python, "naive", tmp_path, device).get("visible") for device in (CPU, torch.device("cuda", 0))]
    assert found == ["", "3"]


def test_what_runs_alone_hears_of_no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "1")
    assert not re.search("^(RANK|LOCAL_.*)=", run_alone(["env"])[0].stdout, re.M)


@pytest.mark.slow
def test_a_run_that_fails_says_why(tmp_path, ranks, warm):
    """... and nothing of it stays."""
    with pytest.raises(StunError, match=r"jobs\.prune of .*made/source: .*experts\.fraction"):
        benchmark(request("depth", tmp_path / "run", "depths=[1]", "target=0.9", "experts.fraction=1"), ranks)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("family", [arctic, qwen3_moe])
def test_checkpoints_are_whole(tmp_path, family):
    """transformers finds every weight in them, and their bytes are known before they are made."""
    config = family(SHAPE)
    write_checkpoint(tmp_path / "model", config, torch.device("cpu"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert sum(i.nbytes for i in Checkpoint.open(tmp_path / "model").tensors.values()) == bytes_of(config)


def test_arctic_has_its_published_size():
    """480B parameters: 128 experts of 3 x 7168 x 4864 in each of 35 layers, 56 heads of which 8 for keys."""
    layer = 128 * 3 * 7168 * 4864 + 3 * 7168**2 + 2 * 7168 * (7168 + 8 * 128) + 128 * 7168 + 3 * 7168
    shape = CheckpointShape(hidden=7168, expert_width=4864, experts=128, top_k=2, layers=35, vocabulary=32000)
    assert bytes_of(arctic(shape)) == 2 * (35 * layer + 2 * 32000 * 7168 + 7168)
    assert request("layer", "r").gpu_shape == replace(shape, layers=4, vocabulary=512)


def test_digests_tell_tensors_apart(tmp_path):
    tensors = {"a": torch.zeros(4), "b": torch.arange(6.0).view(2, 3)}
    for name, other in (
        ("one", {}),
        ("same", {}),
        ("value", {"a": torch.tensor([0, 0, 0, 1.0])}),
        ("shape", {"b": torch.arange(6.0)}),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors | other, tmp_path / name / "model.safetensors")
    one, same, value, shape = (digests(tmp_path / name) for name in ("one", "same", "value", "shape"))
    assert one == same and one.keys() == {"a", "b"}
    assert one["b"] == value["b"] and one["a"] != value["a"] and one["b"] != shape["b"]


@pytest.mark.parametrize("case", [case.name for case in BenchmarkCase])
def test_every_case_has_a_configuration(case):
    assert request(case, "r").case is BenchmarkCase[case]
    assert sorted(file.stem for file in (ROOT / "conf/case").glob("*.yaml")) == sorted(case.name for case in BenchmarkCase)


@pytest.mark.parametrize(
    ("case", "overrides", "what"),
    [
        ("layer", ["shape.hidden=100"], "multiple of 64"),
        ("layer", ["shape.top_k=9"], r"shape\.top_k=9: at most shape\.experts=8"),
        ("layer", ["experts.fraction=auto"], "a number as experts"),
        ("layer", ["sparsify.ratios=owl"], "uniform ratios"),
        ("layer", ["depth=0"], "depth=0"),
        ("layer", ["shape.expert_width=1000000000"], "GiB of disk are needed"),
        ("weights", ["methods.wanda=['sparsify.swops=1']"], "swops"),
        ("io", ["threads=[0]"], "threads"),
        ("growth", ["factors=[]"], "factors"),
        ("growth", ["factors=[100000]"], "calibration"),
        ("ranks", ["worlds=[0]"], "worlds"),
        ("depth", ["depths=[0,1]"], "depths"),
        ("depth", ["model.path=nowhere"], "not a folder"),
        ("depth", ["target=1"], "target=1"),
        ("peers", ["depths=[0]"], "depths"),
        ("peers", ["sparsify.method=magnitude"], "Wanda alone"),
        ("peers", ["target=0"], "target=0"),
        ("peers", ["target=0.1"], r"target=0\.1: 2 of 8 experts"),
        ("peers", ["shape.top_k=7"], r"shape\.top_k=7: 2 of 8 experts"),
        ("peers", ["peers.llmcompressor=nowhere"], "no such program"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, ranks, case, overrides, what):
    with pytest.raises(StunError, match=what):
        benchmark(request(case, tmp_path / "run", *overrides), ranks)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_else_is_refused(tmp_path, ranks):
    """The results of other cases are not in the way, the case's own are."""
    (tmp_path / "depth.json").write_text("{}")
    for name in ("layer.json", "notes.txt"):
        (tmp_path / name).write_text("kept")
        with pytest.raises(StunError, match="holds something"):
            benchmark(request("layer", tmp_path), ranks)
        assert (tmp_path / name).read_text() == "kept"
        (tmp_path / name).unlink()
    with pytest.raises(StunError, match=r"shape\.top_k"):
        benchmark(request("layer", tmp_path, "shape.top_k=9"), ranks)
