"""How each command of the documents is tested. A command that is in no table here fails the tests."""

from dataclasses import dataclass

# A model of no size on the text that the tests write: what changes a documented run into one of seconds.
TINY = tuple(
    """
    model.hidden_size=16 model.num_layers=2 model.dense_hidden_size=16 model.moe.num_experts=4
    model.moe.expert_hidden_size=8 model.vocab_size=300 model.attention.num_heads=1 data.source=text
    data.paths=[~/texts] data.tokenizer.vocab_size=300 data.sequence_length=32 train.global_batch_tokens=128
    train.micro_batch_size=1 train.steps=2 train.eval_sequences=4 metrics.tensorboard=false
    """.split()
)


# The same for a model that is given.
SHORT = tuple(word for word in TINY if word.startswith(("data.sequence", "train.", "metrics.")))


@dataclass(frozen=True)
class Inside:
    """Runs as it stands, in this process: any `moebius` command that trains nothing."""

    shows: str = ""  # must be in its output
    code: int = 0
    needs: str = ""  # a command of STARTED that has to come first


@dataclass(frozen=True)
class Started:
    """Runs as processes of its own, with overrides added at its end."""

    overrides: tuple[str, ...]
    needs: str = ""
    shows: str = "Try next:"
    trains: bool = True  # else nothing at all is added


TRAIN = "moebius train --config configs/tiny.yaml --sample"
EXPORT = "moebius export --from runs/tiny --to tiny-published"
IMPORT = "moebius import --from tiny-published --to tiny-weights"
_CONTINUED = (
    "moebius train --config tiny-weights/config.yaml data.source=text 'data.paths=[~/texts]' "
    "data.sequence_length=256 train.global_batch_tokens=1024 train.steps=50 schedule.warmup_steps=10"
)
_RECORD = "--config configs/tiny.yaml --out runs/trace"
RECORD = f"moebius verify record {_RECORD} --noise"
RECORD_TWO = f"deepspeed --num_accelerators 2 launch/verify/record.py {_RECORD}-ep2 parallel.expert=2"
_TWO = "launch/train.py --config configs/tiny.yaml parallel.expert=2 name=tiny-two"
_BIG = "launch/train.py --config configs/tiny.yaml parallel.expert=8 train.global_batch_tokens=65536 name=big"

INSIDE = {
    "moebius train --help": Inside(shows="model.moe.top_k"),
    "moebius generate --run runs/tiny --prompt 'class '": Inside(shows="class ", needs=TRAIN),
    "moebius eval --run runs/tiny": Inside(shows="bits per byte", needs=TRAIN),
    "moebius eval --run runs/tiny data.source=text 'data.paths=[~/texts]'": Inside(shows="perplexity", needs=TRAIN),
    "moebius plot runs/tiny --out loss.png": Inside(shows="loss.png", needs=TRAIN),
    "moebius params --config configs/tiny.yaml": Inside(shows="11.7M"),
    "moebius params --config configs/tiny.yaml model.moe.num_experts=64 model.moe.top_k=4": Inside(shows="all"),
    "moebius params --config configs/models/telechat3-105b.yaml": Inside(shows="105B"),
    "moebius pipeline --schedule zbv --pp 2 --microbatches 4": Inside(shows="in theory"),
    "moebius pipeline --schedule dualpipev --pp 4 --microbatches 8 --out dualpipev.svg": Inside(shows="dualpipev.svg"),
    "moebius pipeline --schedule dualpipev --pp 4 --microbatches 6": Inside(code=2, shows="use 8"),
    "moebius checkpoints runs/tiny": Inside(shows="complete", needs=TRAIN),
    "moebius checkpoints runs/tiny --verify": Inside(shows="verified", needs=TRAIN),
    "moebius info": Inside(shows="can be used here"),
    "moebius train --config configs/tiny.yaml model.moe.topk=1": Inside(code=2),
    "moebius train --config configs/tiny.yaml model.moe.top_k=64": Inside(code=2),
    "moebius train --config configs/tiny.yaml train.steps=many": Inside(code=2),
}

STARTED = {
    RECORD: Started(TINY, shows="readings"),
    RECORD_TWO: Started(TINY, needs=RECORD, shows="readings"),
    "moebius verify compare runs/trace runs/trace-ep2": Started((), needs=RECORD_TWO, shows="same: ", trains=False),
    TRAIN: Started(TINY, shows="A sample of what the model writes, after the beginnings of held-out documents:"),
    "moebius train --config configs/tiny.yaml --resume": Started(
        (*TINY, "train.steps=3"), needs=TRAIN, shows="from step 2 on"
    ),
    "moebius train --config configs/mine.yaml --sample": Started(TINY),
    EXPORT: Started((), needs=TRAIN, shows="config.json and tokenizer", trains=False),
    IMPORT: Started((), needs=EXPORT, shows="of a deepseek_v3 model", trains=False),
    _CONTINUED: Started(SHORT, needs=IMPORT),
    "moebius train --config configs/models/tiny/gpt-oss.yaml": Started(
        ("data.source=text", "data.paths=[~/texts]", "train.steps=2", "metrics.tensorboard=false")
    ),
    f"deepspeed --num_accelerators 2 {_TWO}": Started(TINY),
    "torchrun --nproc-per-node 2 --max-restarts 3 launch/train.py --config configs/tiny.yaml --auto-resume "
    "parallel.expert=2 name=tiny-watched": Started(TINY),
    "deepspeed --num_accelerators 4 launch/train.py --config configs/tiny.yaml parallel.pipeline=2 parallel.expert=2 "
    "train.micro_batch_size=1 name=tiny-four": Started(TINY),
    f"torchrun --nproc-per-node 2 {_TWO}": Started((*TINY, "name=with-torchrun")),
}

# The same as another command but for what stands in front of it.
SAME: dict[str, str] = {}

# Run by .ci/run, because they run these tests or take minutes. The target must exist, and .ci/run must name it.
BY_CI = ("make train", "make test", "make test-slow", "make test-ascend-sim", "make lint")

NOT_HERE = {
    "moebius verify record --config tests/verify/golden/golden.yaml --out runs/here --noise": "a second "
    "machine's part; tests/verify/test_golden.py records the same",
    "moebius verify compare runs/there runs/here": "needs a trace of a second machine",
    "moebius verify record --config tests/verify/golden/golden.yaml --out tests/verify/golden --steps 2 "
    "--noise": "writes into the checkout; .ci/run and tests/verify/test_golden.py record the same elsewhere",
    "moebius train --config configs/models/telechat3-105b.yaml --dry-run --world-size 4096 --rank 0": "a minute; "
    "tests/distributed/test_dry_run.py runs it for the last rank",
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make train": "downloads packages",
    "make train ARGS=--resume": "installs; what it starts is tabled above",
    'make train ARGS="name=again seed=1"': "installs and takes minutes",
    'make test ARGS="tests/trainer/model"': "runs tests inside a test",
    "make test ARGS=tests/backends/conformance": "runs tests inside a test",
    "make test-cuda": "a GPU; tests/backends/test_cuda.py starts it without one",
    "make test-ascend": "an NPU; the same suite as above on another device",
    "source /usr/local/Ascend/ascend-toolkit/set_env.sh": "CANN",
    "pip install --editable '.[ascend]' --extra-index-url https://download.pytorch.org/whl/cpu": "installs",
    "benchmarks/cuda.sh": "a GPU; tests/benchmarks/test_cuda_script.py starts it without one, and dry",
    "source .venv/bin/activate": "changes the shell; here the environment is on the path",
    "python benchmarks/step.py --config configs/bench/qwen3.yaml --peer transformers --profile": "minutes; "
    "tests/benchmarks runs the script on a model of no size",
    "python benchmarks/step.py --config configs/bench/dsv3.yaml --peer transformers --precision bf16": "minutes",
    "python benchmarks/bubble.py --pp 4 --microbatches 8 16": "a minute; tests/benchmarks runs it with pauses of 1 ms",
    "OMP_NUM_THREADS=1 python benchmarks/engine.py": "minutes; tests/benchmarks runs the script on a model of no size",
    "moebius verify layouts --config configs/tiny.yaml --world 8 model.num_layers=8 data.sequence_length=32": "an "
    "hour; tests/distributed/test_pipelines.py runs parts of it",
    "moebius verify layouts --config configs/tiny.yaml --world 2": "minutes; tests/launch/test_verify_layouts.py "
    "runs it on a smaller model",
    "moebius verify ops --config configs/tiny.yaml": "a minute; tests/trainer/verify/test_ops.py checks its operations",
    "moebius verify run runs/reference runs/other": "two long runs; tests/trainer/verify/test_runs.py writes some",
    "tensorboard --logdir runs": "a server that runs until it is stopped",
    f"deepspeed --hostfile hosts {_BIG}": "two machines; tests/distributed/test_hosts.py makes two",
    "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr first --master-port 29500 "
    f"{_BIG}": "two machines",
    f"sbatch docs/launching/slurm.sh {_BIG.partition(' ')[2]}": "a Slurm cluster; test_launching.py runs the script",
    "kubectl apply -f docs/launching/kubernetes.yaml": "a Kubernetes cluster; test_launching.py reads the manifest",
    f"bash docs/launching/ascend.sh 2 0 first {_BIG.partition(' ')[2]}": "two Ascend nodes; test_launching.py runs the "
    "script with stand-ins",
}

# Ranks that a launcher's words start, or that a dry run pretends; the documents' hosts file has two machines with eight
# slots each.
RANKS = {
    "deepspeed --num_accelerators 2": 2,
    "deepspeed --num_accelerators 4": 4,
    "torchrun --nproc-per-node 2": 2,
    "deepspeed --hostfile hosts": 16,
    "torchrun --nnodes 2": 16,
    "sbatch": 16,
    "bash docs/launching/ascend.sh 2": 16,
    "moebius train --config configs/models/telechat3-105b.yaml --dry-run --world-size 4096": 4096,
}

# Files in backticks that a run makes or a user has, so that the checkout does not hold them.
NOT_IN_THE_CHECKOUT = {
    ".venv",
    "runs/tiny",
    "runs/<name>",
    "configs/mine.yaml",
    "config.yaml",
    "metrics.jsonl",
    "tensorboard/",
    "csv/",
    "checkpoints/",
    "pipeline/",
    "tokenizer.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "manifest.json",
    "trace.json",
    "trace.npz",
    "runs/tiny/checkpoints/step-000250",
    "~/texts",
}

# Flags of the launchers, and of scripts that are not Python.
OTHER_FLAGS = {"--node-rank", "--master", "--master-port", "--dry"}
