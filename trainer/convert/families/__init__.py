"""The families of published models that can be read and written."""

from collections.abc import Mapping

from trainer.convert.families import bailing_moe, bailing_moe_v2, deepseek_v3, glm4_moe, gpt_oss, qwen3_moe
from trainer.convert.family import Family

_ALL = (deepseek_v3, qwen3_moe, glm4_moe, gpt_oss, bailing_moe, bailing_moe_v2)
FAMILIES: Mapping[str, Family] = {module.FAMILY.name: module.FAMILY for module in _ALL}
