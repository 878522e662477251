"""How far two runs are from each other: losses, norms, expert loads and the final state."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from trainer import checkpoint
from trainer.metrics.jsonl import FILE_NAME, read

LOSSES = ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss", "validation_loss")


@dataclass(frozen=True)
class Difference:
    """Largest relative differences, and what has to be equal."""

    loss: float
    grad_norm: float
    weights: float  # norm of the difference over the norm, the worst tensor
    moments: float
    load_equal: bool  # tokens per expert, at every step
    bias_equal: bool

    def within(self, bound: float) -> bool:
        """Whether all is, and what has to be equal is equal."""
        return all(share < 1 for share in self.shares(bound).values()) and self.load_equal and self.bias_equal

    def shares(self, bound: float) -> dict[str, float]:
        """Each relative difference as a share of its bound.

        Moments are sums of squares of what ``bound`` is for: twice the error and more, so theirs is ten times that.
        """
        bounds = {"loss": bound, "grad_norm": bound, "weights": bound, "moments": 10 * bound}
        return {name: getattr(self, name) / limit for name, limit in bounds.items()}


def difference(one: Path, other: Path, steps: int) -> Difference:
    """Compare two run directories that trained ``steps`` steps, every record and the newest checkpoint.

    Figures, steps and tensors that only one of them has are an AssertionError: no layout of one model can differ so.
    """
    expected, found = records(one), records(other)
    assert [sorted(record) for record in expected] == [sorted(record) for record in found], "other records"
    assert sum("loss" in record for record in found) == steps, "not as many steps"
    pairs = list(zip(expected, found, strict=True))
    before, after = tensors(one), tensors(other)
    assert before.keys() - {"rng.0"} == {key for key in after if not key.startswith("rng.")}, "other tensors"
    apart = {
        key: _relative(float(value.norm()), float((value - after[key]).norm()))
        for key, value in before.items()
        if not key.startswith(("rng.", "buffer."))
    }
    return Difference(
        loss=max(_relative(a[key], b[key] - a[key]) for a, b in pairs for key in LOSSES if key in a),
        grad_norm=max(_relative(a["grad_norm"], b["grad_norm"] - a["grad_norm"]) for a, b in pairs if "loss" in a),
        weights=max(error for key, error in apart.items() if key.startswith("weight.")),
        moments=max(error for key, error in apart.items() if key.startswith("exp_avg")),
        load_equal=all(a.get("expert_load") == b.get("expert_load") for a, b in pairs),
        bias_equal=all(torch.equal(value, after[key]) for key, value in before.items() if key.startswith("buffer.")),
    )


def _relative(value: float, error: float) -> float:
    """Infinite where it is no number."""
    share = abs(error) / abs(value) if value else math.inf if error else 0.0
    return share if math.isfinite(share) else math.inf


def records(run: Path) -> list[dict]:
    """Its metrics."""
    return read(run / FILE_NAME)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, whole."""
    newest = checkpoint.newest(run)
    assert newest is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is unavailable or uninitialized")  # so it shall be
        nested = _load_state_dict_from_keys(checkpoint_id=newest)
    flat: dict[str, torch.Tensor] = {}

    def walk(value: dict, prefix: str) -> None:
        for key, entry in value.items():
            if isinstance(entry, dict):
                walk(entry, f"{prefix}{key}.")
            else:
                flat[prefix + key] = entry

    walk(nested, "")
    return flat
