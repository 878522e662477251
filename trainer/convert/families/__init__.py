"""The families of published models that can be read and written."""

from collections.abc import Mapping

from trainer.convert.families import deepseek_v3, glm4_moe, qwen3_moe
from trainer.convert.family import Family

FAMILIES: Mapping[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (deepseek_v3, qwen3_moe, glm4_moe)
}
