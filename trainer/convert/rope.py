"""Rotary positions in config.json: `rope_theta`, `rope_scaling` and `partial_rotary_factor`.

transformers 5 writes all of it as `rope_parameters`; published files have the older keys, which it reads as well and
which are what we write.
"""

from typing import Any

from backends.errors import UserError
from trainer.model.config import RopeConfig, YarnConfig

_PLAIN = ("default", None)


def rope_from(theirs: dict[str, Any], latent: bool, partial: float | None, where: str) -> RopeConfig:
    """Our keys, but for ``interleaved``.

    Args:
        theirs: config.json.
        latent: the attention is MLA, where `mscale_all_dim` also moves the softmax scale.
        partial: `partial_rotary_factor` where it is missing; None: the family has none.
        where: the file, for messages.
    """
    given = theirs.get("rope_parameters") or {
        **(theirs.get("rope_scaling") or {}),
        "rope_theta": theirs.get("rope_theta"),
    }
    key = "rope_parameters" if theirs.get("rope_parameters") else "rope_scaling"
    theta = given.get("rope_theta")
    if not isinstance(theta, (int, float)):
        raise UserError(f"{where}: rope_theta: is {'missing' if theta is None else theta}; take the published file")
    kind = given.get("rope_type", given.get("type"))
    if kind not in (*_PLAIN, "yarn"):
        raise UserError(f"{where}: {key}: is of type {kind!r}, which we cannot compute; only yarn is supported")
    fraction = given.get("partial_rotary_factor", theirs.get("partial_rotary_factor", partial))
    if partial is None and fraction not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor: is {fraction}, which this family does not have; remove it")
    yarn = YarnConfig() if kind in _PLAIN else _yarn(given, latent, f"{where}: {key}")
    return RopeConfig(theta=float(theta), fraction=1.0 if fraction is None else float(fraction), yarn=yarn)


def _yarn(given: dict[str, Any], latent: bool, where: str) -> YarnConfig:
    if given.get("attention_factor") is not None:
        raise UserError(f"{where}: attention_factor: is set, which we have no key for; only mscale is supported")
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if all_dim and (not latent or not mscale):
        raise UserError(f"{where}: mscale_all_dim: is {all_dim}; it needs mscale beside it, and MLA")
    try:
        return YarnConfig(
            factor=float(given["factor"]),
            original_max_position=int(given["original_max_position_embeddings"]),
            beta_fast=float(given.get("beta_fast") or 32),
            beta_slow=float(given.get("beta_slow") or 1),
            mscale=float(mscale) if mscale and all_dim else 1.0,  # alone it has no meaning in transformers
            mscale_all_dim=float(all_dim or 0),
            truncate=bool(given.get("truncate", True)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({error!r}); take the published file") from None


def rope_to(rope: RopeConfig, latent: bool, partial: float | None) -> dict[str, Any]:
    """Their keys; see :func:`rope_from`."""
    yarn, fraction = rope.yarn, {} if partial is None else {"partial_rotary_factor": rope.fraction}
    if yarn.factor <= 1:
        return {"rope_theta": rope.theta, "rope_scaling": None, **fraction}
    scaling = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
        **({"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim} if latent and yarn.mscale_all_dim else {}),
    }
    return {"rope_theta": rope.theta, "rope_scaling": scaling, **fraction}
