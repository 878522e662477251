"""Time our engine's training step against the same schedule with torch's own optimizer, on processes of this machine.

    OMP_NUM_THREADS=1 python benchmarks/engine.py

Both train the same model through the same pipeline on the same tokens, in the same processes, and take turns, a step
each. One has the engine: gradients summed into the part that a rank steps, ZeRO-1, weights gathered again. The other
does what one writes with torch alone: gradients in one flat buffer and one all-reduce, clipping by the norm over all
stages, and fused AdamW over all weights of the rank.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

import backends  # noqa: E402
from backends.base import Backend  # noqa: E402
from launch.arguments import Parser  # noqa: E402
from launch.errors import run  # noqa: E402
from launch.show import console, table  # noqa: E402
from parallel import topology as topologies  # noqa: E402
from parallel.pipeline.pipeline import Pipeline  # noqa: E402
from parallel.topology import Topology, sum_over  # noqa: E402
from trainer.build import build, build_model  # noqa: E402
from trainer.config.load import load_config  # noqa: E402
from trainer.config.schema import Config  # noqa: E402
from trainer.config.validate import validate_layout  # noqa: E402
from trainer.model import MicroBatch, MoETransformer, Share  # noqa: E402
from trainer.optimizer import adamw, parameter_groups  # noqa: E402

PROCESSES = 4
# 30 M parameters. The shared embedding of multi-token prediction would need more than torch's plain optimizer.
MODEL = """
model.hidden_size=256 model.num_layers=6 model.vocab_size=8192 model.dense_hidden_size=1024
model.moe.expert_hidden_size=128 model.moe.num_experts=48 model.moe.expert_bias=false model.mtp_layers=0
data.sequence_length=128 train.global_batch_tokens=2048 train.micro_batch_size=2 train.precision=fp32
optimizer.lr=0.0003
""".split()
LAYOUTS = {"pp2 × dp2, 1f1b": ["parallel.pipeline=2"], "dp4": ["parallel.pipeline=1"]}


@dataclass
class Contender:
    """A model in training, and how its steps went."""

    model: MoETransformer
    pipeline: Pipeline
    end_micro_batch: Callable[[], None]
    update: Callable[[], None]  # gradients of this rank in, weights of all ranks changed
    steps: list[float] = field(default_factory=list)  # seconds
    updates: list[float] = field(default_factory=list)  # of these, after the last rank's last backward pass
    losses: list[float] = field(default_factory=list)


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = Parser(prog="benchmarks/engine.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--config",
        default=str(ROOT / "configs" / "tiny.yaml"),
        metavar="PATH",
        help="what to train (configs/tiny.yaml)",
    )
    add("--steps", type=int, default=20, metavar="N", help="timed steps of each, in each layout (20)")
    add("--warmup", type=int, default=2, metavar="N", help="steps before those (2)")
    add("overrides", metavar="key=value", nargs="*", help="overrides a key of the file, after those of this benchmark")
    return run(lambda: _bench(parser.parse_intermixed_args(argv)), debug=False)


def _bench(args: argparse.Namespace) -> int:
    configs = {name: load_config(args.config, [*MODEL, *layout, *args.overrides]) for name, layout in LAYOUTS.items()}
    for config in configs.values():
        validate_layout(config, PROCESSES, args.config)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, (folder, configs, args.warmup, args.steps), nprocs=PROCESSES)
        results = json.loads(Path(folder, "results.json").read_text())
    headings = ("layout", "parameters", "step: torch", "engine", "ratio", "update: torch", "engine", "loss: torch")
    shown = table(*headings, "engine", numbers=len(headings))
    for name, result in results.items():
        plain, ours = result["torch"], result["engine"]
        ratio = median(mine / theirs for mine, theirs in zip(ours["steps"], plain["steps"], strict=True))
        steps, updates = ([f"{median(one[what]):.3f} s" for one in (plain, ours)] for what in ("steps", "updates"))
        losses = [f"{one['losses'][-1]:.5f}" for one in (plain, ours)]
        shown.add_row(name, f"{result['parameters'] / 1e6:.1f} M", *steps, f"{ratio:.3f}", *updates, *losses)
    console().print(shown)
    return 0


def _measure(rank: int, folder: str, configs: dict[str, Config], warmup: int, steps: int) -> None:
    """What one process does; the first one writes the figures."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.environ["WORLD_SIZE"] = str(PROCESSES)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    results = {}
    for name, config in configs.items():
        backend = backends.select("cpu")
        topology = topologies.start(backend, config.parallel)
        contenders = {"torch": _plain(config, topology, backend), "engine": _engine(config, topology, backend)}
        draw = torch.Generator().manual_seed(config.seed)
        for number in range(warmup + steps):
            batch = _micro_batches(config, topology, draw)
            turns = list(contenders.values())
            for contender in turns if number % 2 else reversed(turns):  # neither always follows the other
                _step(contender, batch, topology, timed=number >= warmup)
        held = sum(p.numel() for p in contenders["torch"].model.parameters()) / topology.dp.size
        results[name] = {
            "parameters": float(sum_over(topology.world, torch.tensor(held))),
            **{key: {k: getattr(one, k) for k in ("steps", "updates", "losses")} for key, one in contenders.items()},
        }
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    topologies.stop()


def _step(contender: Contender, batch: list[MicroBatch], topology: Topology, timed: bool) -> None:
    dist.barrier()
    began = time.perf_counter()
    contender.pipeline.train(batch, contender.end_micro_batch)
    trained = time.perf_counter()
    contender.update()
    # One clock for all processes of a machine.
    times = torch.tensor([-began, trained, time.perf_counter()], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    sums, _ = contender.model.meters.take()
    loss = sum_over(topology.world, sums.get("lm_loss", torch.zeros(())).clone())
    if timed:
        contender.steps.append(float(times[2] + times[0]))
        contender.updates.append(float(times[2] - times[1]))
        contender.losses.append(float(loss))


def _micro_batches(config: Config, topology: Topology, draw: torch.Generator) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch of random tokens."""
    length, size = config.data.sequence_length, config.train.micro_batch_size
    sequences = config.train.global_batch_tokens // length
    rows = torch.randint(config.model.vocab_size, (sequences, length + 1), generator=draw)
    mine = rows.chunk(topology.dp.size)[topology.dp.rank]
    positions = torch.arange(length).expand(size, length)
    share = Share(tokens=float(sequences * length), sequences=float(sequences))
    return [MicroBatch(part[:, :-1], positions, None, part[:, 1:].contiguous(), share) for part in mine.split(size)]


def _engine(config: Config, topology: Topology, backend: Backend) -> Contender:
    model, engine, pipeline = build(config, topology, backend)

    def update() -> None:
        engine.reduce()
        engine.step(config.optimizer.lr)

    return Contender(model, pipeline, engine.end_micro_batch, update)


def _plain(config: Config, topology: Topology, backend: Backend) -> Contender:
    model, pipeline = build_model(config, topology, backend)
    parameters = list(model.parameters())
    assert model.embedding_copy is None, "mtp_layers=0 and no tied embeddings"
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    groups = [
        {"params": group.parameters, "weight_decay": group.weight_decay}
        for group in parameter_groups(model, config.optimizer.weight_decay)
        if group.parameters
    ]
    optimizer = adamw(config.optimizer)(groups)

    @torch.no_grad()
    def update() -> None:
        sum_over(topology.dp, flat)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).square()
        norm = sum_over(topology.pp, square).sqrt()
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip_norm, norm)
        optimizer.step()
        flat.zero_()

    return Contender(model, pipeline, lambda: None, update)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
