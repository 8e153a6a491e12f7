"""The compressed form: exact, smaller, described as it is stored, and refused where it is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_tensors, run_job, same_tensors, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import make_checkpoint

from stun.checkpoint.compressed import (
    COMPRESSED_INDEX,
    compress,
    compress_tensor,
    expand,
    expand_tensor,
    is_compressed,
    load_model,
    mark,
)
from stun.checkpoint.writer import copy_extras
from stun.config import StunError
from stun.files import write_json

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
SHAPES = [(6, 64), (5, 13), (9, 1), (1, 7), (3, 4, 16), (2, 5, 11), (700, 1001)]


def sparse(shape, share: float, dtype=torch.bfloat16) -> torch.Tensor:
    """A random tensor, about `share` of its entries zero."""
    tensor = torch.randint(1, 100, shape).to(dtype)
    return torch.where(torch.rand(shape) < share, torch.zeros((), dtype=dtype), tensor)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def compress_folder(source: Path, folder: Path) -> Path:
    """Write the checkpoint `source` to `folder` in the compressed form."""
    folder.mkdir()
    copy_extras(source, folder)
    write_json(folder / "config.json", mark(json.loads((source / "config.json").read_text())))
    weight_map = {}
    for file in sorted(source.glob("*.safetensors")):
        stored, metadata = compress(load_file(file))
        save_file(stored, folder / file.name, metadata=metadata)
        weight_map |= dict.fromkeys(stored, file.name)
    write_json(folder / COMPRESSED_INDEX, {"metadata": {}, "weight_map": weight_map})
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape, dtype):
    torch.manual_seed(0)
    tensor = sparse(shape, 0.95, dtype)
    bitmask, values = compress_tensor(tensor) or (None, None)
    if bitmask is None:
        stored = -(-shape[-1] // 8) * tensor[..., 0].numel() + int((tensor != 0).sum()) * dtype.itemsize
        assert stored >= tensor.nbytes, "left as it is only where nothing is saved"
        return
    assert bitmask.dtype == torch.uint8 and bitmask.shape == (*shape[:-1], -(-shape[-1] // 8)) and values.dtype == dtype
    expanded = expand_tensor(bitmask, values, shape[-1])
    assert expanded.shape == shape and expanded.dtype == dtype and torch.equal(bytes_of(expanded), bytes_of(tensor))


def test_layout():
    tensor = torch.zeros(2, 3, 11)
    kept = {(0, 0, 0): 1.5, (0, 0, 8): 2.0, (0, 2, 10): 3.0, (1, 1, 3): -0.0, (1, 1, 7): float("nan")}
    for place, value in kept.items():
        tensor[place] = value
    stored, metadata = compress({"w": tensor, "bias": torch.zeros(4)})
    assert stored.keys() == {"w.bitmask", "w.values", "bias"} and json.loads(metadata["bitmask_columns"]) == {"w": 11}
    for expert, row, column in [(e, r, c) for e in range(2) for r in range(3) for c in range(16)]:
        bit = int(stored["w.bitmask"][expert, row, column // 8]) >> (column % 8) & 1
        assert bit == ((expert, row, column) in kept)
    assert torch.equal(bytes_of(stored["w.values"]), bytes_of(torch.tensor(list(kept.values()))))
    assert torch.equal(bytes_of(expand_tensor(stored["w.bitmask"], stored["w.values"], 11)), bytes_of(tensor))


def test_what_stays_dense():
    full, empty = torch.ones(8, 16), torch.zeros(0, 16)
    vector, deep = torch.zeros(64), torch.zeros(2, 2, 2, 8)
    tensors = {"full": full, "empty": empty, "vector": vector, "deep": deep, "one": torch.tensor(0.0)}
    stored, metadata = compress(tensors)
    assert stored == tensors and metadata == {"format": "pt"}
    zero, metadata = compress({"zero": torch.zeros(8, 16)})
    assert zero["zero.values"].shape == (0,) and not zero["zero.bitmask"].any()
    assert torch.equal(expand_tensor(zero["zero.bitmask"], zero["zero.values"], 16), torch.zeros(8, 16))
    edge = torch.ones(8, 16, dtype=torch.bfloat16)
    edge.view(-1)[:8] = 0
    assert compress_tensor(edge) is None, "16 bytes of bitmask for 8 entries of 2 bytes: nothing saved"
    edge.view(-1)[8] = 0
    assert compress_tensor(edge) is not None
    other = sparse((64, 16), 0.9)[:, :8]
    assert torch.equal(expand_tensor(*compress_tensor(other), 8), other), "a view into a larger tensor"
    for name in ("a.bitmask", "a.values"):
        with pytest.raises(StunError, match=rf"{name}: the compressed form cannot store"):
            compress({name: full})


def test_size_falls_with_sparsity(tmp_path):
    sizes, shape = [], (256, 512)
    for share in (0.0, 0.3, 0.5, 0.7, 0.9):
        torch.manual_seed(0)
        stored, metadata = compress({"w": sparse(shape, share)})
        save_file(stored, tmp_path / "x.safetensors", metadata=metadata)
        sizes.append((tmp_path / "x.safetensors").stat().st_size / (256 * 512 * 2))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == pytest.approx([1.0, 0.7625, 0.5625, 0.3625, 0.1625], abs=0.01), "1/16 for the bitmask and the share kept"


@pytest.mark.parametrize("family, dtype", [("mixtral", torch.bfloat16), ("granitemoe", torch.float32)])
def test_folder(tmp_path, family, dtype):
    source = make_checkpoint(tmp_path / "source", family, dtype=dtype)
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t.where(torch.rand(t.shape) < 0.4, 0) if t.dim() > 1 else t for n, t in tensors.items()}, file)
    folder = compress_folder(source, tmp_path / "compressed")
    assert is_compressed(folder) and not is_compressed(source)
    sizes = [sum(file.stat().st_size for file in where.glob("*.safetensors")) for where in (folder, source)]
    assert sizes[0] < 0.6 * sizes[1]
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)

    expand(folder, tmp_path / "out" / "dense")
    same_tensors(source, tmp_path / "out" / "dense")
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "out/dense/config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (source / name).read_bytes() == (tmp_path / "out/dense" / name).read_bytes()
    assert not (tmp_path / "out/dense" / COMPRESSED_INDEX).exists()

    prompt = torch.arange(3, 60)[None]
    expected, model = AutoModelForCausalLM.from_pretrained(source), load_model(folder)
    assert model.dtype == dtype and model.generation_config.to_dict() == expected.generation_config.to_dict()
    for found in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dense")):
        assert torch.equal(found(prompt).logits, expected(prompt).logits)
    assert load_model(folder, dtype=torch.float16).dtype == torch.float16
    model.save_pretrained(tmp_path / "saved")
    assert not is_compressed(tmp_path / "saved")
    same_tensors(source, tmp_path / "saved")

    before = sorted((tmp_path / "out/dense").iterdir())
    with pytest.raises(StunError, match=r"output=.*dense: holds something else"):
        expand(folder, tmp_path / "out" / "dense")
    assert before == sorted((tmp_path / "out/dense").iterdir())
    with pytest.raises(StunError, match=r"source: is not compressed"):
        expand(source, tmp_path / "again")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A compressed folder of two files: w [2, 4, 11] in the first, norm [64] in the second."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "source").mkdir()
    write_json(folder / "source" / "config.json", {"model_type": "mixtral"})
    save_file({"w": torch.eye(4, 11).repeat(2, 1, 1)}, folder / "source" / "a.safetensors")
    save_file({"norm": torch.ones(64)}, folder / "source" / "b.safetensors")
    return compress_folder(folder / "source", folder / "model")


def edit_json(name, change):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def edit_file(change, file="a.safetensors", **metadata):
    """Change a file's tensors by `change(tensors)`, and its metadata."""

    def edit(folder):
        with safe_open(folder / file, "pt") as handle:
            old = handle.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, metadata={**old, **metadata})

    return edit


def keep(tensors):
    pass


def fewer_values(tensors):
    tensors["w.values"] = tensors["w.values"][:-1]


def more_bits(tensors):
    tensors["w.bitmask"][0, 0, 0] |= 2


def bits_beyond(tensors):
    tensors["w.bitmask"][0, 0] = torch.tensor([0, 8])


def dense_too(tensors):
    tensors["w"] = torch.ones(2)


def truncate(folder):
    (folder / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-8])


def newer(config):
    config["stun_format"]["version"] = 2


def other_form(config):
    config["stun_format"] = "zip"


HOSTILE = [
    (edit_json("config.json", newer), r"config\.json: stun_format=.*'version': 2.*only .*'version': 1"),
    (edit_json("config.json", other_form), r"config\.json: stun_format=zip"),
    (lambda folder: (folder / "config.json").write_text("["), r"config\.json: cannot be read as JSON"),
    (lambda folder: (folder / COMPRESSED_INDEX).unlink(), r"model\.bitmask\.index\.json: cannot be read"),
    (edit_json(COMPRESSED_INDEX, dict.clear), r"index\.json: has no weight_map"),
    (edit_json(COMPRESSED_INDEX, lambda c: c["weight_map"].update(norm="../b.safetensors")), r"names the file '\.\./b\.safe"),
    (edit_json(COMPRESSED_INDEX, lambda c: c["weight_map"].update(x="b.safetensors")), r"b\.safetensors: x: stands in one of"),
    (edit_json(COMPRESSED_INDEX, lambda c: c["weight_map"].pop("w.values")), r"a\.safetensors: w\.values: stands in one of"),
    (lambda folder: (folder / "b.safetensors").unlink(), r"b\.safetensors: cannot be read"),
    (truncate, r"a\.safetensors: truncated"),
    (edit_file(fewer_values), r"a\.safetensors: w\.values: holds 7 values, 8 bits are set in .*w\.bitmask"),
    (edit_file(more_bits), r"a\.safetensors: w\.values: holds 8 values, 9 bits are set"),
    (edit_file(bits_beyond), r"a\.safetensors: w\.bitmask: has bits beyond its 11 columns"),
    (edit_file(lambda t: t.update({"w.bitmask": t["w.bitmask"].short()})), r"w\.bitmask: must be uint8 .* is torch\.int16"),
    (edit_file(lambda t: t.update({"w.bitmask": t["w.bitmask"][0, 0]})), r"w\.bitmask: must be uint8 .*\(2,\)"),
    (edit_file(lambda t: t.update({"w.bitmask": t["w.bitmask"][..., :1]})), r"w\.bitmask: shape \(2, 4, 1\) cannot hold .* 11"),
    (edit_file(lambda t: t.update({"w.values": t["w.values"][None]})), r"w\.values: must have 1 dimension, is .*\(1, 8\)"),
    (edit_file(lambda t: t.pop("w.values")), r"a\.safetensors: w\.values: missing, but bitmask_columns names"),
    (edit_file(lambda t: t.pop("w.bitmask")), r"a\.safetensors: w\.bitmask: missing, but bitmask_columns names"),
    (edit_file(dense_too), r"a\.safetensors: w: is not what bitmask_columns in the metadata says"),
    (edit_file(keep, bitmask_columns="{}"), r"a\.safetensors: w\.bitmask: is not what bitmask_columns"),
    (edit_file(keep, bitmask_columns='{"w": "11"}'), r"a\.safetensors: metadata bitmask_columns must map names to numbers"),
    (edit_file(keep, bitmask_columns='{"w": 17}'), r"w\.bitmask: shape \(2, 4, 2\) cannot hold rows of 17 columns"),
    (edit_file(keep, bitmask_columns="w"), r"a\.safetensors: metadata bitmask_columns: cannot be read as JSON"),
]


@pytest.mark.parametrize("damage, message", HOSTILE, ids=[message[-30:] for _, message in HOSTILE])
def test_damaged_is_refused(tmp_path, small, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    damage(folder)
    with pytest.raises(StunError, match=message):
        expand(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StunError, match=message):
        load_model(folder)


def test_tensor_in_two_files_is_refused(tmp_path, small):
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    edit_file(lambda tensors: tensors.update(w=torch.ones(2)), "b.safetensors")(folder)
    edit_json(COMPRESSED_INDEX, lambda content: content["weight_map"].update(w="b.safetensors"))(folder)
    with pytest.raises(StunError, match=r"b\.safetensors: w: stands in another file too"):
        expand(folder, tmp_path / "out")


def test_undamaged_is_expanded(tmp_path, small):
    expand(small, tmp_path)
    assert torch.equal(load_tensors(tmp_path)["w"], torch.eye(4, 11).repeat(2, 1, 1))


@pytest.mark.launch
def test_jobs(tmp_path, checkpoint):
    """A run with compress=true on two ranks holds the same tensors as one without, and jobs.expand writes them."""
    source = checkpoint("mixtral")
    for name, ranks, flag in (("plain", 1, "false"), ("packed", 2, "true")):
        run_job("prune", settings(source, tmp_path / name, target=0.5, compress=flag), ranks)
    run_job("expand", [f"model.path={tmp_path / 'packed' / 'model'}", f"output={tmp_path / 'dense'}"])
    same_tensors(tmp_path / "plain" / "model", tmp_path / "dense")
    plain, packed = (json.loads((tmp_path / n / "manifest.json").read_text())["summary"] for n in ("plain", "packed"))
    assert packed["bytes_written"] < plain["bytes_written"] and packed["nonzero"] == plain["nonzero"]
    refused = run_job("expand", [f"model.path={source}", f"output={tmp_path / 'other'}"], check=False)
    assert refused.returncode == 2 and refused.stderr.startswith(f"error: {source}: is not compressed")
    assert len(refused.stderr.strip().splitlines()) == 1
