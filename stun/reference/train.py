"""Training of a small MoE model, such as the embedded one, on synthetic tasks and prose: tokenizer, batches, an AdamW loop."""

import copy
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from stun.reference.balance import Loads, auxiliary_loss
from stun.reference.prose import PROSE, mixed, read_prose, tokens_of, up_to
from stun.reference.tasks import STRINGS, TASKS, Sample, generate

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass
class TrainConfig:
    """Settings of the training; the defaults gave the embedded model. `model` overrides the defaults of transformers'
    configuration for `model_type`.

    `prose`: UTF-8 text file whose paragraphs empty lines part; half of the tokens are then its own, and each counts for
    `prose_weight` of an answer's. `balance` scales the routers' auxiliary loss, of all layers together or of each (`per_layer`);
    where routers have correction biases, `bias_step` moves those instead, after every step.
    """

    output: str = "stun/reference"
    seed: int = 0
    steps: int = 3500
    batch: int = 32
    length: int = 160
    lr: float = 2.5e-3
    warmup: int = 100
    weight_decay: float = 0.1
    prompt_weight: float = 0.1
    balance: float = 0.01
    per_layer: bool = False
    bias_step: float = 0.005
    prose: str = ""
    prose_weight: float = 0.5
    threads: int = 1
    log_every: int = 50
    save_every: int = 500
    calibration_samples: int = 1500
    heldout_samples: int = 1000
    vocab_size: int = 512
    model_type: str = "arctic"
    model: dict = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 32,
            "num_experts_per_tok": 2,
            "moe_layer_frequency": 1,
            "parallel_attn_mlp_res": True,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
        }
    )


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer; every digit is a token, and a word or letter includes its leading space."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    symbols = {"special_tokens": [PAD, BOS, EOS], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **symbols)
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def packed_batches(
    cfg: TrainConfig, tokenizer: PreTrainedTokenizerFast, samples: Iterator[Sample]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, weights), both [batch, length]; a weight scales that token's loss."""
    need = cfg.batch * cfg.length
    ids: list[int] = []
    weights: list[float] = []
    while True:
        while len(ids) < need:
            chunk = list(itertools.islice(samples, 256))
            questions = tokenizer([s.question for s in chunk], add_special_tokens=False)["input_ids"]
            answers = tokenizer([s.answer for s in chunk], add_special_tokens=False)["input_ids"]
            for sample, question, answer in zip(chunk, questions, answers, strict=True):
                weight = cfg.prose_weight if sample.task == PROSE else 1.0
                ids += [tokenizer.bos_token_id, *question, *answer, tokenizer.eos_token_id]
                weights += [cfg.prompt_weight] * (1 + len(question)) + [weight] * (len(answer) + 1)
        shape = (cfg.batch, cfg.length)
        yield torch.tensor(ids[:need]).view(shape), torch.tensor(weights[:need]).view(shape)
        ids, weights = ids[need:], weights[need:]


def _loss(model: PreTrainedModel, ids_BT: torch.Tensor, weights_BT: torch.Tensor, cfg: TrainConfig, loads: Loads):
    """(weighted cross-entropy + cfg.balance * router auxiliary loss, cross-entropy of the tasks' answers)."""
    out = model(ids_BT, output_router_logits=True, use_cache=False)
    loss_N = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    weight_N = weights_BT[:, 1:].flatten()
    answer_N = weight_N == 1.0
    total = (loss_N * weight_N).sum() / weight_N.sum()
    return total + cfg.balance * auxiliary_loss(model, out, loads, cfg.per_layer), (loss_N * answer_N).sum() / answer_N.sum()


def _schedule(step: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))


def _write_texts(cfg: TrainConfig, output: Path, prose: Iterator[Sample], tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    """Write the texts for evaluation and calibration; returns the questions that training must not see.

    `heldout.jsonl` (tasks), `calibration.jsonl`, and with as many tokens `calibration_half.jsonl` (the tasks without arithmetic).
    With prose, half of the calibration is prose, and `heldout_prose.jsonl` and `calibration_prose.jsonl` are nothing else.
    """
    heldout = _distinct(generate(seed=cfg.seed + 1), cfg.heldout_samples)
    exclude = frozenset(s.question for s in heldout)
    calibration = list(itertools.islice(generate(cfg.seed + 2, exclude), cfg.calibration_samples))
    files = {"heldout": heldout}
    if cfg.prose:
        files["heldout_prose"] = up_to(prose, tokens_of(heldout, tokenizer), tokenizer)
        calibration = list(mixed(calibration, prose, tokenizer))
        files["calibration_prose"] = up_to(prose, tokens_of(calibration, tokenizer), tokenizer)
    strings = (s for s in generate(cfg.seed + 5, exclude) if s.task in STRINGS)
    files |= {"calibration": calibration, "calibration_half": up_to(strings, tokens_of(calibration, tokenizer), tokenizer)}
    for name, samples in files.items():
        lines = [json.dumps({**asdict(s), "text": s.question + s.answer}) for s in samples]
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return exclude


def train(cfg: TrainConfig) -> PreTrainedModel:
    """Write the texts (`_write_texts`) and the trained `model/` under `cfg.output`; return the model."""
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.threads)
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)

    apart, prose = read_prose(cfg.prose, cfg.seed)
    shown = [*itertools.islice(generate(cfg.seed + 3), 20000), *prose]
    tokenizer = train_tokenizer([s.question + s.answer for s in shown], cfg.vocab_size)
    exclude = _write_texts(cfg, output, iter(apart), tokenizer)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(cfg.model_type, vocab_size=len(tokenizer), **special, **cfg.model)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-8)

    samples = generate(cfg.seed + 4, exclude)
    batches = packed_batches(cfg, tokenizer, mixed(samples, itertools.cycle(prose), tokenizer) if prose else samples)
    loads = Loads(model)
    for step in range(cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * _schedule(step, cfg)
        loss, answer_loss = _loss(model, *next(batches), cfg, loads)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loads.correct(cfg.bias_step)
        if (step + 1) % cfg.log_every == 0:
            losses = f"loss {loss.item():.4f} | answers {answer_loss.item():.4f}"
            print(f"step {step + 1}/{cfg.steps} | {losses} | smallest load {loads.smallest:.4f}", flush=True)
            loads.reset()
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            _save(model, tokenizer, output / "model")
    return model


def _distinct(samples: Iterator[Sample], count: int) -> list[Sample]:
    """First `count` samples with distinct questions, the same number of every task."""
    seen: dict[str, Sample] = {}
    missing = dict.fromkeys(TASKS, count // len(TASKS))
    while any(missing.values()):
        sample = next(samples)
        if missing[sample.task] and sample.question not in seen:
            seen[sample.question] = sample
            missing[sample.task] -= 1
    return list(seen.values())


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save in bf16 and several shards, the layout of large checkpoints on the hub."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, max_shard_size="3MB")
    tokenizer.save_pretrained(folder)
