"""Where a step's time goes: the profiler's events, each counted once, under the part of the model it serves."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

OTHER = "other"

# The first group with a word in the name of the event or of an event around it takes the event's own time. What
# serves a purpose comes before what is a kind of arithmetic: a multiply inside attention is attention.
GROUPS: dict[str, tuple[str, ...]] = {
    "optimizer": ("bench::optimizer", "AccumulateGrad"),
    "cross entropy": ("CrossEntropy", "cross_entropy", "LogSoftmax", "log_softmax", "NllLoss", "nll_loss"),
    "attention": ("_Attention", "ScaledDotProduct", "scaled_dot_product", "flex_attention"),
    "matmul: experts": ("GroupedMm", "GroupedMM", "_grouped_mm"),
    "routing + permute": (
        "bench::routing",
        *("_Permute", "_Unpermute", "sort", "topk", "TopK", "bincount", "scatter", "Scatter", "gather", "Gather"),
        *("index_add", "IndexAdd", "index_put", "index_select", "IndexSelect", "IndexBackward", "aten::index"),
        *("one_hot", "cumsum", "histc", "softmax", "Softmax", "sigmoid_", "SigmoidBackward"),
    ),
    "norms + elementwise": ("_RMSNorm", "_SwiGLU", "_Rotary", "rms_norm", "triton_"),
    "matmul: projections": ("_WideLinear", "aten::linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"),
}
_ELEMENTWISE = (
    *("mul", "add", "sub", "div", "copy_", "_to_copy", "pow", "rsqrt", "mean", "silu", "cat", "neg", "sum", "sigmoid"),
    *("fill_", "zero_", "clone", "embedding", "cos", "sin", "masked_fill", "square", "sqrt"),
)


def profile_step(step: Callable[[], object], synchronize: Callable[[], object], on_device: bool) -> dict[str, float]:
    """Seconds of one step by group: of the CPU, or of kernels by the operator that started them.

    Time outside every operator (Python, or a device that waits) is "other".
    """
    import time

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
    with profile(activities=activities) as profiler:
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        whole = time.perf_counter() - began
    seconds = dict.fromkeys([*GROUPS, OTHER], 0.0)
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:  # a kernel is an event of its own beside the operator that has its time
            own = event.self_device_time_total if on_device else event.self_cpu_time_total
            seconds[_group(event)] += own / 1e6
    seconds[OTHER] += max(0.0, whole - sum(seconds.values()))
    return seconds


def _names(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def _group(event: Any) -> str:
    names = list(_names(event))
    for group, words in GROUPS.items():
        if any(word in name for name in names for word in words):
            return group
    if any(name.removeprefix("aten::") in _ELEMENTWISE for name in names):
        return "norms + elementwise"
    return OTHER
