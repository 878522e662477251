"""Time one training step of a config: forward, backward, clipping, AdamW, on random tokens.

    python benchmarks/step.py --config configs/bench/qwen3.yaml --peer transformers

On the CPU contenders take turns, one step each, in processes of their own: what the machine does in between hits all
alike. On an accelerator each has the device's memory for itself, one after the other.
"""

import argparse
import math
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = dict(os.environ)  # before our own settings enter it: peers get what the user has
if __name__ == "__main__":  # started as a file
    sys.path[0] = str(ROOT)

from benchmarks.processes import Process  # noqa: E402
from benchmarks.registry import OURS, PEERS  # noqa: E402
from benchmarks.table import Result, heading, profile_table, result_table  # noqa: E402
from launch.arguments import Parser  # noqa: E402
from launch.errors import run  # noqa: E402


def main(argv: list[str]) -> int:
    """Print the table of the config that ``argv`` names."""
    args = _parser().parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: no contender is left computing
    return run(lambda: _bench(args), debug=False)


def _parser() -> Parser:
    parser = Parser(prog="benchmarks/step.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--config", required=True, metavar="PATH", help="the YAML file of a run; its model and optimizer are used")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--sequence", type=int, default=512, metavar="N", help="tokens of a sequence (512)")
    add("--batch", type=int, default=4, metavar="N", help="sequences of a step (4)")
    add("--steps", type=int, default=5, metavar="N", help="timed steps of each contender (5)")
    add("--warmup", type=int, default=1, metavar="N", help="steps before those (1)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of each contender (torch's default)")
    add("--peer", action="append", choices=PEERS, default=[], help="compare with this; may be given several times")
    add("--tuned-peers", action="store_true", help="give peers our allocator settings, too")
    add("--torchtitan-python", default=sys.executable, metavar="PATH", help="interpreter that has torchtitan")
    add("--markdown", action="store_true", help="print tables as Markdown")
    add("--profile", action="store_true", help="one more step of each under the profiler: where its time goes")
    add("overrides", metavar="key=value", nargs="*", help="overrides a key of the file")
    return parser


def _bench(args: argparse.Namespace) -> int:
    jobs = _jobs(args)
    results, failed, peaks = _take_turns(args, jobs)
    print(heading(args, jobs[0], peaks))
    peak = jobs[0]["peak"] or max(peaks, default=math.nan)
    print()
    print(result_table(results, args.batch * args.sequence, jobs[0]["flops_per_token"], peak, args.markdown))
    for name, reason in failed.items():
        print(f"{name}: did not run: {reason}")
    if args.profile:
        print(profile_table(results, args.markdown))
    return 1 if failed.keys() & set(OURS) else 0


def _jobs(args: argparse.Namespace) -> list[dict]:
    """What each process is told."""
    import torch

    from backends import peak, select
    from trainer.config.load import load_config
    from trainer.model import MoETransformer
    from trainer.model.count import flops_per_token

    overrides = [
        *args.overrides,
        f"train.precision={args.precision}",
        f"data.sequence_length={args.sequence}",
        f"train.micro_batch_size={args.batch}",
        f"train.global_batch_tokens={args.batch * args.sequence}",
    ]
    config = load_config(args.config, overrides)
    backend = select(config.backend)
    meta = MoETransformer(config.model, backend.ops)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    common = {
        "config": args.config,
        "overrides": overrides,
        "model": asdict(config.model),
        "optimizer": asdict(config.optimizer),
        "precision": args.precision,
        "batch": args.batch,
        "sequence": args.sequence,
        "threads": args.threads,
        "device": backend.device.type,
        "device_name": backend.device_name,
        "peak": peak.published(backend.device_name, dtype),
        "parameters": sum(p.numel() for p in meta.parameters()),
        "flops_per_token": flops_per_token(config.model, args.sequence),
    }
    names = dict.fromkeys([*OURS, *args.peer])
    return [{**common, "contender": name, "tuned": args.tuned_peers or name in OURS} for name in names]


def _take_turns(args: argparse.Namespace, jobs: list[dict]) -> tuple[dict[str, Result], dict[str, str], list[float]]:
    """Timings by contender, why others gave none, and the rate of matrix multiplies in each round."""
    results: dict[str, Result] = {}
    failed: dict[str, str] = {}
    peaks: list[float] = []
    for together in [jobs] if jobs[0]["device"] == "cpu" else [[job] for job in jobs]:
        processes: dict[str, Process] = {}
        try:
            for job in together:
                name = job["contender"]
                python = args.torchtitan_python if name == "torchtitan" else sys.executable
                processes[name] = Process(job, python, ENVIRONMENT, ROOT)
                processes[name].wait_ready()  # one after the other: they would disturb each other's start
            _rounds(args, processes, results, peaks)
        finally:
            for process in processes.values():
                process.close()
        failed |= {name: process.failure for name, process in processes.items() if process.failure is not None}
    return {name: result for name, result in results.items() if name not in failed}, failed, peaks


def _rounds(
    args: argparse.Namespace, processes: dict[str, Process], results: dict[str, Result], peaks: list[float]
) -> None:
    """A step of each in turn, as often as is asked for, into ``results`` and ``peaks``."""
    for turn in range(args.warmup + args.steps):
        if OURS[0] in processes and (answer := processes[OURS[0]].ask("matmul")):
            peaks.append(answer["flops"])
        for name, process in processes.items():
            if (answer := process.ask("step")) and turn >= args.warmup:
                results.setdefault(name, Result()).add(answer)
    for name, process in processes.items():
        if args.profile and (answer := process.ask("profile")):
            results[name].groups = answer["groups"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
