"""Peak memory of a rank: for every phase of a run, the sum of all bytes held at once.

On CPUs all bytes are in the process. On GPUs, weights, hidden states and products are on the GPU, of the next layer as much as
fits beside them; on the host are the pinned buffers through which tensors are read and written. Experts are assumed to be spread
evenly over the ranks, and tokens evenly over the experts.
"""

from dataclasses import dataclass
from functools import cached_property

from stun.checkpoint.reader import DEQUANTISED
from stun.config import Scope, SparsifyConfig, SparsifyMethod
from stun.model.architecture import expert_infos
from stun.model.layer_layout import LayerLayout
from stun.model.precision import compute_dtype
from stun.planning.job import SHARE, TRIED, Job
from stun.planning.plan import LayerPlan
from stun.preflight.activations import Activations, trace_layers
from stun.preflight.hardware import GIB, Launch, gpu_base
from stun.runtime.device_copies import BUFFERS, PIECE, read_ahead
from stun.runtime.threads import workers_on

LIBRARIES = 160 * 2**20  # allocated by the first calls of libraries (datasets, tokenizer, clustering, products)
# Peak bytes per weight of the matrix being pruned and per entry of its Gram matrix, beside the two themselves, as counted in
# tests/unit/preflight/test_preflight.py. The eigenvectors of ALPS need 8 more inside LAPACK.
SELECT, PATTERN, OUTLIERS = (11, 0), (12, 0), (20, 0)
SPARSEGPT, ALPS, REFIT = (17, 11), (49, 21), (47, 4)
COMPENSATED = (34, 28)  # rounded column by column
ROUND = 26  # the same of a matrix that is rounded to what is written


def transient_costs(config: SparsifyConfig) -> list[tuple[int, int]]:
    """Costs of the steps by which a configuration prunes a matrix, which run one after the other."""
    solver = {SparsifyMethod.sparsegpt: [SPARSEGPT], SparsifyMethod.alps: [ALPS]}.get(config.method, [])
    refits = [REFIT] if config.reconstruct or solver else []
    return [PATTERN if config.pattern else SELECT, *solver, *refits]


@dataclass(frozen=True)
class Weights:
    """Bytes of one layer on a rank: `dense` as stored and, if that is another dtype, converted to the compute dtype; `owned` of
    the dense ones by this rank, which reads and writes them, `all_experts` of it, `experts` it reads to prune them, `kept` of
    these, `local` in number, `joined` of fused tensors."""

    dense: int
    owned: int
    all_experts: int
    experts: int
    kept: int
    local: int
    joined: int

    @property
    def read(self) -> int:
        return self.owned + self.experts


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a rank on the host and on its GPU, and the phase of that peak."""

    host: int
    gpu: int
    phase: str


class Footprint:
    """Memory of one job on one launch."""

    def __init__(self, job: Job, launch: Launch):
        self.job, self.launch = job, launch
        self.arch, self.cfg, self.plan = job.arch, job.cfg, job.plan
        self.streams, self.candidates = job.streams, len(job.fractions)
        self.dtype, self.is_gpu = compute_dtype(job.arch, launch.device), launch.device.type == "cuda"
        self.token = job.arch.token_width * self.dtype.itemsize  # bytes of its hidden state
        self.layers = [self._weights(*pair) for pair in zip(job.arch.layers, job.plan.layers, strict=True)]
        self.heads = [self._weights(*pair) for pair in zip(job.arch.mtp, job.plan.mtp, strict=True)]

    @cached_property
    def activations(self) -> Activations:
        cfg = self.cfg.calibration
        return trace_layers(self.arch, min(cfg.micro_batch, cfg.samples), cfg.length, self.launch.device, self.launch.world)

    @cached_property
    def states(self) -> int:
        """Bytes of the hidden states of a rank's micro-batches, with what layers hand on beside them."""
        cfg = self.cfg.calibration
        carried = self.activations.carried // (min(cfg.micro_batch, cfg.samples) * cfg.length)
        return self.job.tokens_of(self.launch.world) * (self.token + carried)

    def _weights(self, layout: LayerLayout, plan: LayerPlan) -> Weights:
        """Bytes of a layer on the rank with most of it."""
        arch, world = self.arch, self.launch.world
        infos = {name: arch.info(name) for name in layout.copied}
        dense = sum(infos[name].nbytes for name in layout.dense)
        dense += sum(infos[n].numel * self.dtype.itemsize for n in layout.dense if infos[n].dtype is not self.dtype)
        owned = self._most_dealt([info.nbytes for info in infos.values()])
        joined = self._most_dealt([arch.piece(layout, 0, part)[0].nbytes for part in layout.fused_names]) * len(plan.clusters)
        expert = sum(info.nbytes for info in expert_infos(arch, layout))
        needs = layout.num_experts if self.job.runs_dense and not layout.is_mtp else len(plan.needed)
        whole, needed, local = (-(-count // world) for count in (layout.num_experts, needs, len(plan.clusters)))
        return Weights(dense, owned, expert * whole, expert * needed, expert * local, local, joined)

    def _most_dealt(self, sizes: list[int]) -> int:
        """Bytes on the rank with most of them, if they are dealt to the ranks in turn."""
        world = self.launch.world
        return max(sum(sizes[rank::world]) for rank in range(world))

    def peak(self) -> Memory:
        """Peak over all phases, including the bytes that the process holds from the start."""
        phases = [self._embedding(), self._outer_weights()]
        if "observe" in self.streams:
            phases += [self._observe(i) for i in range(len(self.layers))]
        phases += [self._trial(stream, i) for stream in TRIED if stream in self.streams for i in range(len(self.layers))]
        phases += [phase for i in range(len(self.layers)) for phase in self._prune(i)]
        start = self.launch.base + LIBRARIES
        host, gpu = max(p.host for p in phases), max(p.gpu for p in phases) + (gpu_base(self.launch.world) if self.is_gpu else 0)
        largest = max(phases, key=lambda p: (p.gpu, p.host))
        return Memory(start + host, gpu, largest.phase)

    def _memory(self, phase: str, device: int, host: int) -> Memory:
        return Memory(host, device, phase) if self.is_gpu else Memory(device + host, 0, phase)

    def _embedding(self) -> Memory:
        """The embedding, as stored and converted, then with its outputs; in the last stream beside all weights outside the
        layers, which have been written by then."""
        info = self.arch.info(self.arch.embedding)
        beside = sum(self.arch.info(name).nbytes for name in self.arch.outer) - info.nbytes if self.streams["prune"] else 0
        converted = info.numel * self.dtype.itemsize
        both = 0 if info.dtype is self.dtype else info.nbytes
        return self._memory("embedding", converted + max(both, self.states), beside + (info.nbytes if self.is_gpu else 0))

    def _outer_weights(self) -> Memory:
        """Embedding, final norm and output head, copied from file to file on the first rank."""
        outside = sum(self.arch.info(name).nbytes for name in self.arch.outer)
        return Memory(outside, 0, "embedding and head")

    def _held(self, index: int) -> int:
        """Hidden states while a layer runs: its inputs, its outputs and, from the second layer on, the first layer's inputs,
        without the running micro-batch."""
        if not self.streams["prune"] and "observe" not in self.streams:
            return 0
        cfg = self.cfg.calibration
        last = min(self.states, cfg.micro_batch * cfg.length * self.token)
        return self.states * min(3, index + 2) - last + self.activations.arguments

    def _being_written(self, index: int) -> int:
        """Bytes of the layer before until it is written."""
        before = self.layers[index - 1]
        return before.owned + (before.joined or before.kept) if index else 0

    def _read_ahead(self, ahead: int, beside: int) -> tuple[int, int]:
        """Bytes of the next layer, `ahead`, that are held on the GPU `beside` others, and on the host; with those of reading."""
        reading = DEQUANTISED if self.arch.source.formats else 0
        if not self.is_gpu:
            return 0, ahead + reading
        return read_ahead(ahead, self.launch.gpu_memory - beside) + reading, 2 * BUFFERS * PIECE

    def _dense_read_ahead(self, index: int, beside: int) -> tuple[int, int]:
        """The same while a dense layer runs."""
        return self._read_ahead(sum(layer.owned + layer.all_experts for layer in self.layers[index + 1 : index + 2]), beside)

    def _cast(self, layout: LayerLayout) -> int:
        """One matrix of an expert per worker, converted to the compute dtype."""
        if all(info.dtype is self.dtype for info in expert_infos(self.arch, layout)):
            return 0
        largest = max(sum(info.numel for info in self.arch.piece(layout, 0, part)) for part in layout.experts[0])
        return largest * self.dtype.itemsize * min(workers_on(self.launch.device), layout.num_experts)

    def _observe(self, index: int) -> Memory:
        """A layer of the dense model under observation."""
        layout, weights, beside = self.arch.layers[index], self.layers[index], self.activations.layers[index]
        if self.cfg.sparsify.counts_outliers:
            beside = max(beside, self._largest(layout, [OUTLIERS]))
        held = self._held(index) + weights.dense + weights.all_experts
        ahead, host = self._dense_read_ahead(index, held)
        return self._memory(f"observe layer {index}", held + self._cast(layout) + beside + ahead, host)

    def _trial(self, stream: str, index: int) -> Memory:
        """Hidden states, in a search those of all candidates, the dense layer and a pruned copy of it."""
        layout, passing = self.arch.layers[index], -(-2 * self.states // SHARE)  # samples to prune on, and those held out
        waiting = self.candidates * min(index, 1) if stream == "search" else 0
        held = passing * (waiting + 3) + self.activations.arguments  # 3: what runs
        copy = self.layers[index].dense + self.layers[index].all_experts
        masks = self._pruning(layout) + self._grams(layout, index)[0]
        masks += self.layers[index].kept + self._closing(layout)[0] if self.cfg.sparsify.reconstruct else 0
        masks = masks if stream == "search" else 0
        joint = self._joint(layout, index, SHARE) if self.job.refits else 0
        device = held + 2 * copy + self.activations.layers[index] + max(self._cast(layout), masks, joint)
        ahead, host = self._dense_read_ahead(index, held + copy)
        return self._memory(f"{stream} layer {index}", device + ahead, host)

    def _prune(self, index: int) -> list[Memory]:
        """Phases of pruning a layer: choose, measure, mask, refit, run, and hand its tensors over to be written."""
        layout, weights, plan = self.arch.layers[index], self.layers[index], self.plan.layers[index]
        reconstructs = self.cfg.sparsify.reconstruct and self.plan.zeros > 0
        # On the host the pages of removed experts wait for the next layer.
        kept, held = weights.dense + (weights.kept if self.is_gpu else weights.experts), self._held(index)
        is_run, received = self.streams["prune"], weights.joined - weights.joined // self.launch.world
        run = held + self.activations.layers[index] + self._cast(layout) if is_run else 0
        grams, turn = self._grams(layout, index) if is_run else (0, 0)
        idle = max(0, held - self.states) if is_run else 0
        stored = int((weights.kept + weights.owned) * self.job.grid.bits / 16) if self.job.grid else 0
        if self.job.keeps_form and self.job.refits:  # what has new scales
            stored = int(weights.owned * self.arch.source.bits / 16)
        clones = weights.kept + self._closing(layout)[0] if reconstructs else 0
        device = {
            "choose": weights.dense + weights.experts + (3 * self._cast(layout) if plan.nearest else 0) + idle,
            "measure": kept + run + grams + turn + clones,
            "mask": kept + idle + grams + clones + stored + (self._pruning(layout) if self.plan.zeros else 0),
            "run": kept + run + stored,
            "hand over": kept + idle + received + stored,
        }
        if self.job.grid or (self.job.keeps_form and (self.job.refits or self.job.solves(self.plan))):
            device["round"] = kept + idle + stored + self._rounding(layout)
        if reconstructs:
            sums, passing = self._pairs(layout, index)
            device["refit"] = kept + clones + stored + sums + max(run + passing, idle + self._largest(layout, [REFIT]))
        joint = self._joint(layout, index) if self.job.refits else 0
        dense = 2 * self.states  # the dense model's, before and after the layer
        if self.job.runs_dense:
            device["dense"] = weights.dense + weights.experts + run + dense
        if self.job.refits:
            rounded = workers_on(self.launch.device) * self._largest(layout, [COMPENSATED]) if stored else 0
            device["joint refit"] = kept + idle + dense + joint + stored + rounded
        following, unwritten = [*self.layers, *self.heads][index + 1 : index + 2], self._being_written(index)
        beside = unwritten + weights.dense + weights.experts + (held if is_run else 0) + joint
        ahead, host = self._read_ahead(sum(layer.read for layer in following), beside)
        return [self._memory(f"prune layer {index}: {name}", size + unwritten + ahead, host) for name, size in device.items()]

    def _joint(self, layout: LayerLayout, index: int, share: int = 1) -> int:
        """Bytes of a joint refit on one sample in `share`: the problem, and the rows of a micro-batch on their way."""
        if not layout.experts:
            return 0
        height, width = self.arch.down_shape(layout)
        tokens = min(self.states // self.token, self.cfg.calibration.micro_batch * self.cfg.calibration.length)
        passing = 3 * 4 * tokens * self.arch.top_k * height + workers_on(self.launch.device) * 12 * width**2
        held = self.job.refit_bytes(layout, self.plan.layers[index], self.launch.world, self.dtype.itemsize, share)
        return held + max(self.activations.layers[index], passing)

    def matrices(self, layout: LayerLayout) -> dict[str, tuple[int, int]]:
        """Rows and columns of the dense matrices in scope."""
        scope = self.cfg.sparsify.scope
        return {name: tuple(self.arch.info(name).shape[:2]) for name, kind in layout.linears.items() if kind in scope}

    def parts(self, layout: LayerLayout) -> dict[str, tuple[int, int]]:
        """Rows and columns of an expert's matrices in scope."""
        shapes = {}
        for part in layout.experts[0] if layout.experts and Scope.experts in self.cfg.sparsify.scope else ():
            infos = self.arch.piece(layout, 0, part)
            if len(infos[0].shape) > 1:
                shape = (sum(info.shape[0] for info in infos), infos[0].shape[1])
                shapes[part] = shape[::-1] if layout.is_transposed else shape
        return shapes

    def _largest(self, layout: LayerLayout, costs: list[tuple[int, int]]) -> int:
        """Bytes for the most expensive matrix of the layer, beside the matrix and its Gram matrix."""
        shapes = [*self.matrices(layout).values(), *self.parts(layout).values()]
        return max((w * r * c + g * c * c for r, c in shapes for w, g in costs), default=0)

    def _pruning(self, layout: LayerLayout) -> int:
        """Bytes for all workers while each of them prunes a matrix."""
        rounded = [COMPENSATED] if self.job.grid and self.cfg.sparsify.reads_grams else []
        return workers_on(self.launch.device) * self._largest(layout, [*transient_costs(self.cfg.sparsify), *rounded])

    def _rounding(self, layout: LayerLayout) -> int:
        """Bytes for all workers while each of them rounds a matrix to what is written."""
        infos = expert_infos(self.arch, layout) + [self.arch.info(name) for name in layout.linears]
        largest = max((info.numel for info in infos), default=0)
        return ROUND * workers_on(self.launch.device) * largest

    def _squared_inputs(self, layout: LayerLayout) -> int:
        """Bytes of the Gram matrices of one expert."""
        return 4 * sum(columns**2 for _, columns in self.parts(layout).values())

    def block(self, index: int) -> int:
        """Experts of a rank that are measured together (stun.pruning.mask)."""
        config, local = self.cfg.sparsify, self.layers[index].local
        gram_bytes = self._squared_inputs(self.arch.layers[index]) * (2 if config.reconstruct else 1)
        return min(local, max(1, int(config.gram_gib * GIB / gram_bytes))) if config.reads_grams and gram_bytes else local

    def _at_once(self, index: int) -> int:
        """Experts that are measured at the same time, each with its own sums of a micro-batch."""
        return max(1, min(workers_on(self.launch.device), self.block(index)))

    @cached_property
    def passes(self) -> int:
        """Forwards of a layer in which its weights are measured and refitted."""
        blocks = max(-(-layer.local // max(1, self.block(index))) or 1 for index, layer in enumerate(self.layers))
        return blocks * (2 if self.cfg.sparsify.reconstruct else 1)

    @cached_property
    def gram_bytes(self) -> int:
        """Most bytes of Gram matrices that a rank holds."""
        return max(self._grams(layout, index)[0] for index, layout in enumerate(self.arch.layers))

    def _expert_grams(self, index: int) -> int:
        return self._squared_inputs(self.arch.layers[index]) * self.block(index)

    def _grams(self, layout: LayerLayout, index: int) -> tuple[int, int]:
        """Bytes of a rank's Gram matrices, and of one micro-batch's parts before they are added."""
        if not self.cfg.sparsify.reads_grams or not self.plan.zeros:
            return 0, 0
        expert_bytes, dense = self._squared_inputs(layout), {n: 4 * shape[1] ** 2 for n, shape in self.matrices(layout).items()}
        owned = self._most_dealt([dense.get(name, 0) for name in layout.copied])
        shared = sum(dense.values()) // 2  # matrices of one block have the same inputs, and one Gram matrix of a micro-batch
        return self._expert_grams(index) + owned, shared + expert_bytes * self._at_once(index)

    def _closing(self, layout: LayerLayout) -> tuple[int, int]:
        """Dense matrices that close a block: bytes with their inputs in all micro-batches, and bytes of their Gram matrices."""
        closers = [name for name in self.matrices(layout) if layout.closes(name)]
        hidden = self.arch.config.hidden_size
        inputs = sum(self.states * self.arch.info(name).shape[1] // hidden for name in closers)
        copies = sum(self.arch.info(name).nbytes for name in closers) // self.launch.world
        return inputs + copies, sum(8 * self.arch.info(name).shape[1] ** 2 for name in closers)

    def _pairs(self, layout: LayerLayout, index: int) -> tuple[int, int]:
        """Bytes of both sums (x x^T and y x^T) for the matrices that close experts and dense blocks, beside the earlier sums of
        the dense matrices; and bytes of one micro-batch's parts."""
        down, closing = 8 * self.parts(layout).get("down_proj", (0, 0))[1] ** 2, self._closing(layout)[1]
        held = down * self.block(index) + closing + self._grams(layout, index)[0] - self._expert_grams(index)
        return held, down * self._at_once(index) + closing
