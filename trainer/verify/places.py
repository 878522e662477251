"""Where in the model a difference comes from: the order of the passes, and whose work lies between two readings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer.verify.readings import Key

_WORK = {
    "attention": "attention itself: rotary positions, mask or softmax",
    "moe": "dispatch, weights of the combination or the shared expert's sum",
    "router": "scores, or what is made of them: weights, scale, precision",
    "experts": "an expert's weights or arithmetic",
}


def forward_place(name: str, before: str) -> tuple[str, str]:
    """Module and kind of work between the reading ``name``, the first that differs, and all before it.

    ``X.input`` is what the module X was given, so that the work is its surroundings'.
    """
    module, _, given = name.rpartition(".")
    if not given.startswith("input"):
        bare = name.partition("[")[0]
        last = bare.rpartition(".")[2]
        if last.endswith("_loss"):
            return module, f"{last} of the router"
        if last.endswith("norm"):
            return bare, "normalisation: epsilon, weight or precision"
        return name, _WORK.get(last, "the module's own arithmetic or weights")
    surroundings = module.rpartition(".")[0]
    if module.partition("[")[0].endswith(".experts"):
        return surroundings, "dispatch: other rows reach the expert"
    if module == "layers.0":
        return "embed", "embedding"
    if surroundings == "mtp":
        return module, "multi-token prediction: the tokens that it embeds" if given != "input" else "hidden states"
    if surroundings in ("", "layers"):
        return module, f"hand-over of hidden states from {before}"
    if surroundings.startswith("mtp.") and surroundings.count(".") == 1:
        return surroundings, "multi-token prediction: how its inputs are put together"
    last = surroundings.rpartition(".")[2]
    return surroundings, _WORK.get(last, "arithmetic between its modules")


def backward_order(parameters: Sequence[str]) -> Callable[[Key], tuple[int, int]]:
    """A sort key: the head first, then multi-token prediction, the norm, and the layers from the last to the first."""
    number = {name: index for index, name in enumerate(parameters)}

    def place(key: Key) -> tuple[int, int]:
        name, _, expert = key.name.partition("[")
        return -number[name], int(expert[:-1]) if expert else 0

    return place
