"""Hostile inputs: each ends in this package's own error, which names the file and the field, in bounded time and memory and with
nothing written."""

from __future__ import annotations

import hashlib
import random
import re
import resource
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import config_mutations, mutations, run_mutations, scale_mutations
from helpers.forms import fp8, rewrite
from helpers.paths import TEXT
from helpers.selections import config
from helpers.stops import stopped_after
from helpers.tensors import load_tensors, same_tensors
from helpers.zoo import make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import CalibrationConfig, SparsifyConfig, StunError
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.model.architecture import Architecture
from stun.planning.from_statistics import plan_from_run
from stun.pruning.job import prune

SECONDS = 20
SLACK = 2**29  # address space that threads and allocators take whatever they are asked


class Hang(BaseException):
    """No handler of errors takes it for one."""


def allocated() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def bounded(nbytes: int):
    """Within it there is address space for `nbytes` more and SLACK, and an end after SECONDS."""

    def ring(*_):
        raise Hang

    before, limits = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (allocated() + nbytes + SLACK, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def content(folder: Path) -> dict[str, int]:
    """The files in a folder, however deep, and when they were written."""
    return {str(file.relative_to(folder)): file.lstat().st_mtime_ns for file in folder.rglob("*") if not file.is_dir()}


def causes(error: BaseException | None):
    while error:
        yield error
        error = error.__cause__ or error.__context__


def refused(folder: Path, work, says: str) -> None:
    """`work` ends in a StunError that says so, without an attempt to get more memory than the files in `folder` take, and leaves
    it as it is."""
    before = content(folder)
    nbytes = sum((folder / name).lstat().st_size for name in before)
    with bounded(nbytes), pytest.raises(StunError) as caught:
        work()
    assert re.search(says, str(caught.value), re.S), f"{str(caught.value)[:500]}\ndoes not say\n{says}"
    for error in causes(caught.value):
        assert not isinstance(error, MemoryError) and "allocate" not in str(error), f"ran out of memory: {error!r}"
    assert content(folder) == before, "something was written"


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """`sources(family, **changes)`: a small checkpoint, made once."""
    made: dict[str, Path] = {}

    def get(family: str, **changes) -> Path:
        if family not in made:
            made[family] = make_checkpoint(tmp_path_factory.mktemp(family) / "model", family, shard="150KB", **changes)
        return made[family]

    return get


def mutated(source: Path, folder: Path, mutate) -> Path:
    shutil.copytree(source, folder / "model")
    mutate(folder / "model")
    return folder / "model"


CALIBRATION = CalibrationConfig(path=str(TEXT), samples=2, length=16, micro_batch=1)


def request_for(folder: Path, **changes):
    return config(folder / "model", folder / "run", calibration=CALIBRATION, **changes)


@pytest.fixture(scope="module")
def warm(sources, tmp_path_factory, ranks):
    """A run that ends well, after which libraries and allocators have what they need."""
    folder = tmp_path_factory.mktemp("warm")
    mutated(sources("mixtral", num_hidden_layers=2), folder, lambda folder: None)
    prune(request_for(folder), ranks)
    return ranks


def cases(*tables: dict) -> list:
    return [pytest.param(*case, id=name) for table in tables for name, case in table.items()]


@pytest.mark.parametrize("mutate, says", cases(mutations.HEADERS, mutations.INDEXES, mutations.FILES, mutations.TENSORS))
def test_checkpoint(sources, tmp_path, warm, mutate, says):
    mutated(sources("mixtral", num_hidden_layers=2), tmp_path, mutate)
    refused(tmp_path, lambda: prune(request_for(tmp_path), warm), says)


@pytest.mark.parametrize("mutate, says", cases(config_mutations.CONFIGS))
def test_config(sources, tmp_path, warm, mutate, says):
    mutated(sources("mixtral", num_hidden_layers=2), tmp_path, mutate)
    refused(tmp_path, lambda: prune(request_for(tmp_path), warm), says)


@pytest.mark.parametrize(
    "family, field, value",
    [(family, *field) for family, fields in config_mutations.OF_FAMILIES.items() for field in fields.items()],
)
def test_config_of_family(sources, tmp_path, warm, family, field, value):
    mutated(sources(family), tmp_path, config_mutations.having(**{field: value}))
    refused(tmp_path, lambda: prune(request_for(tmp_path), warm), "config.json|n_group")


@pytest.mark.parametrize("name", config_mutations.TOKENIZERS)
def test_tokenizer(sources, tmp_path, warm, name):
    mutated(sources("mixtral", num_hidden_layers=2), tmp_path, config_mutations.TOKENIZERS[name])
    refused(tmp_path, lambda: prune(request_for(tmp_path), warm), "model: its tokenizer|the tokenizer of .*model")


CHAT = '{"text": [{"role": "user", "content": "What is it?"}]}\n'


@pytest.mark.parametrize("name", config_mutations.TEMPLATES)
def test_chat_template(sources, tmp_path, warm, name):
    template = mutations.text_of("chat_template.jinja", config_mutations.TEMPLATES[name])
    mutated(sources("mixtral", num_hidden_layers=2), tmp_path, template)
    (tmp_path / "chat.jsonl").write_text(CHAT * 4)
    calibration = CalibrationConfig(path=str(tmp_path / "chat.jsonl"), samples=2, length=16)
    request = replace(request_for(tmp_path), calibration=calibration)
    refused(tmp_path, lambda: prune(request, warm), r"chat.jsonl: row 0: field 'text': the chat template of .*model fails")


@pytest.fixture(scope="module")
def planned(sources, tmp_path_factory, warm):
    """A folder with a model, a finished run, the plan it made and text."""
    folder = tmp_path_factory.mktemp("planned")
    mutated(sources("mixtral", num_hidden_layers=2), folder, lambda folder: None)
    prune(request_for(folder), warm)
    shutil.copy(folder / "run" / "plan.json", folder / "plan.json")
    return folder


def like(planned: Path, folder: Path, *names: str) -> None:
    """Copy parts of the folder."""
    for name in names:
        (shutil.copytree if (planned / name).is_dir() else shutil.copy)(planned / name, folder / name)


@pytest.mark.parametrize("mutate, says", cases(run_mutations.PLANS))
def test_plan(planned, tmp_path, warm, mutate, says):
    like(planned, tmp_path, "model", "plan.json")
    mutate(tmp_path)
    refused(tmp_path, lambda: prune(request_for(tmp_path, plan=str(tmp_path / "plan.json")), warm), says)


@pytest.mark.parametrize("name", run_mutations.RATIOS)
def test_ratios(planned, tmp_path, warm, name):
    like(planned, tmp_path, "model")
    mutations.text_of("ratios.json", run_mutations.RATIOS[name])(tmp_path)
    request = request_for(tmp_path, sparsify=SparsifyConfig(ratios=str(tmp_path / "ratios.json")))
    refused(tmp_path, lambda: prune(request, warm), "sparsify.ratios=.*ratios.json: ")


@pytest.mark.parametrize("text, says", cases(run_mutations.LINES))
def test_calibration(planned, tmp_path, warm, text, says):
    like(planned, tmp_path, "model")
    mutations.text_of("text.jsonl", text)(tmp_path)
    calibration = CalibrationConfig(path=str(tmp_path / "text.jsonl"), samples=4, length=32)
    request = replace(request_for(tmp_path), calibration=calibration)
    refused(tmp_path, lambda: prune(request, warm), f"text.jsonl.*{says}")


def make_plan(folder: Path) -> None:
    plan_from_run(request_for(folder), folder / "made.json")


@pytest.mark.parametrize("name", run_mutations.ABOUTS)
def test_about_statistics(planned, tmp_path, name):
    like(planned, tmp_path, "model", "run")
    run_mutations.ABOUTS[name](tmp_path / "run")
    refused(tmp_path, lambda: make_plan(tmp_path), r"stats/about\.json: |statistics belong to another model")


@pytest.mark.parametrize("change, says", cases(run_mutations.STATISTICS))
def test_statistics(planned, tmp_path, change, says):
    like(planned, tmp_path, "model", "run")
    file = tmp_path / "run" / run_mutations.FIRST
    run_mutations.stored(run_mutations.FIRST, change)(tmp_path / "run")
    refused(tmp_path, lambda: make_plan(tmp_path), f"{file.name}: is damaged")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    mutations.edit(run_mutations.ABOUT, lambda about: about["files"].update({file.name: digest}))(tmp_path / "run")
    refused(tmp_path, lambda: make_plan(tmp_path), f"{file.name}: {says}")


@pytest.fixture(scope="module")
def half_done(sources, tmp_path_factory, warm):
    """A folder with a model and a run of it that ended after the first pruned layer."""
    folder = tmp_path_factory.mktemp("half")
    mutated(sources("mixtral", num_hidden_layers=2), folder, lambda folder: None)
    with stopped_after("prune", 0):
        prune(request_for(folder), warm)
    return folder


@pytest.mark.parametrize("mutate, says", cases(run_mutations.RESUMED))
def test_resumed(half_done, tmp_path, warm, mutate, says):
    """The request names the original model: its folder is part of the run's identity."""
    like(half_done, tmp_path, "run")
    mutate(tmp_path / "run")
    request = replace(request_for(half_done), run_dir=str(tmp_path / "run"))
    with bounded(2**20), pytest.raises(StunError) as caught:
        prune(request, warm)
    assert re.search(says, str(caught.value)), str(caught.value)[:500]
    assert not list((tmp_path / "run" / "model").glob("*.json")), "nothing is declared complete"


@pytest.mark.parametrize("name, data", [("a.parquet", b"PAR1" + bytes(64)), ("a.txt", b"\xff\xfe\xfd"), ("a.json", b"[{")])
def test_calibration_of_other_kinds(planned, tmp_path, warm, name, data):
    like(planned, tmp_path, "model")
    (tmp_path / name).write_bytes(data)
    request = replace(request_for(tmp_path), calibration=CalibrationConfig(path=str(tmp_path / name), samples=4, length=32))
    refused(tmp_path, lambda: prune(request, warm), f"calibration.path=.*{name}: ")


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A folder with a block-scaled fp8 checkpoint."""
    folder = tmp_path_factory.mktemp("scaled")
    fp8(folder / "model", "deepseek_v3", 8, 8)
    return folder


SCALED = "model.layers.1.mlp.experts.0.up_proj.weight"


@pytest.mark.parametrize("change, says", cases(scale_mutations.SCALES))
def test_scales(scaled, tmp_path, warm, change, says):
    like(scaled, tmp_path, "model")
    change(tmp_path / "model")
    refused(tmp_path, lambda: prune(request_for(tmp_path), warm), says)


def test_a_block_larger_than_its_matrix_takes_no_more_memory(scaled, tmp_path, warm):
    """The scale of one block for a whole matrix is repeated for the matrix, not for the block."""
    like(scaled, tmp_path, "model")
    rewrite_blocks(tmp_path / "model", 10**6)
    with bounded(2**20):
        source = Checkpoint.open(tmp_path / "model")
        assert torch.isfinite(source.read(SCALED)).all()


def rewrite_blocks(folder: Path, size: int) -> None:
    tensors = load_tensors(folder)
    whole = {name: tensor[:1, :1] if name.endswith("_scale_inv") else tensor for name, tensor in tensors.items()}
    rewrite(folder, whole, quantization_config={"quant_method": "fp8", "weight_block_size": [size, size]})


def test_weights_that_are_no_numbers(sources, tmp_path, warm):
    """They are found when they are read: the run has begun, but nothing is declared complete."""
    change = mutations.tensor(mutations.ROUTER, lambda weight: weight * float("nan"))
    mutated(sources("mixtral", num_hidden_layers=2), tmp_path, change)
    with bounded(2**20), pytest.raises(StunError, match=r"layer 0: .*not finite"):
        prune(request_for(tmp_path), warm)
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "manifest.json").exists()


def cached(source: Path, folder: Path) -> Path:
    """The checkpoint as the hub's cache holds it: links in a snapshot to blobs."""
    snapshot, blobs = folder / "models--a--b" / "snapshots" / "c0ffee", folder / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def test_the_cache_of_the_hub_is_read(sources, tmp_path, warm):
    source = sources("mixtral", num_hidden_layers=2)
    snapshot = cached(source, tmp_path)
    (tmp_path / "model").symlink_to(snapshot)
    prune(replace(request_for(tmp_path), target=0.0), warm)
    same_tensors(source, tmp_path / "run" / "model")
    assert not any(file.is_symlink() for file in (tmp_path / "run" / "model").iterdir())


@pytest.mark.parametrize("target", ["../../../secret", "../../../models--a--evil/blobs/0", "../../refs/main", "../../blobs/out"])
def test_the_cache_of_the_hub_is_no_way_out(sources, tmp_path, warm, target):
    snapshot = cached(sources("mixtral", num_hidden_layers=2), tmp_path)
    file = snapshot / target
    file.resolve().parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to("/etc/passwd") if target.endswith("out") else file.write_text("{}")
    (snapshot / "notes.txt").symlink_to(target)
    (tmp_path / "model").symlink_to(snapshot)
    refused(tmp_path, lambda: prune(request_for(tmp_path), warm), "notes.txt: links to .*; only files in the checkpoint's own")


def test_links_inside_the_folder_are_followed(sources, tmp_path, warm):
    mutated(sources("mixtral", num_hidden_layers=2), tmp_path, lambda folder: None)
    (tmp_path / "model" / "notes.txt").symlink_to("config.json")
    prune(replace(request_for(tmp_path), target=0.0), warm)
    assert (tmp_path / "run" / "model" / "notes.txt").is_file()


def test_code_beside_the_weights_is_not_run(sources, tmp_path, warm):
    folder, marker = mutated(sources("mixtral", num_hidden_layers=2), tmp_path, lambda folder: None), tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nModel = Tokenizer = Config\n")
    maps = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json"):
        mutations.edit(name, lambda content: content.update(auto_map=maps, trust_remote_code=True))(folder)
    prune(request_for(tmp_path), warm)
    assert not marker.exists()
    mutations.edit("tokenizer_config.json", lambda content: content.update(tokenizer_class="Evil"))(folder)
    shutil.rmtree(tmp_path / "run")
    try:
        prune(request_for(tmp_path), warm)
    except StunError as error:
        assert "its tokenizer" in str(error)
    assert not marker.exists()


def outcome(folder: Path) -> list:
    """What a run takes from headers and index."""
    tensors = Architecture(Checkpoint.open(folder)).source.tensors
    return sorted((name, info.file.name, info.start, info.shape, str(info.dtype)) for name, info in tensors.items())


@pytest.mark.parametrize("place", ["header", mutations.INDEX])
def test_flipped_bits(sources, tmp_path, place):
    """Each flip of a bit in a header or index is refused or changes nothing."""
    folder, rng = mutated(sources("mixtral", num_hidden_layers=2), tmp_path, lambda folder: None), random.Random(1)
    file = folder / place if place != "header" else mutations.shard_of(folder)
    whole, expected, refusals = file.read_bytes(), outcome(folder), 0
    end = len(whole) if place != "header" else 8 + int.from_bytes(whole[:8], "little")
    for _ in range(150):
        position = rng.randrange(end)
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << rng.randrange(8)]) + whole[position + 1 :])
        try:
            with bounded(2**20):
                assert outcome(folder) == expected
        except StunError as error:
            assert folder.name in str(error)
            refusals += 1
    assert refusals > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_flipped_bits_of_settings(sources, tmp_path, name):
    """Other values may be possible ones; whatever is not ends in an error of this package."""
    folder, rng = mutated(sources("mixtral", num_hidden_layers=2), tmp_path, lambda folder: None), random.Random(2)
    whole, expected, refusals = (folder / name).read_bytes(), outcome(folder), 0
    for _ in range(100):
        position = rng.randrange(len(whole))
        flipped = whole[:position] + bytes([whole[position] ^ 1 << rng.randrange(8)]) + whole[position + 1 :]
        (folder / name).write_bytes(flipped)
        try:
            with bounded(2**20):
                assert outcome(folder) == expected
                calibration_samples(CALIBRATION, load_tokenizer(folder), 260)
        except StunError as error:
            assert folder.name in str(error)
            refusals += 1
    assert refusals > 30


def test_the_bounds_hold():
    """Memory and time run out where they should, or nothing above means anything."""
    with bounded(0), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2**32, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Hang):
        patch.setitem(globals(), "SECONDS", 1)
        with bounded(0):
            while True:
                pass
