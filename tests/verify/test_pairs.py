"""Layouts without a fault: no pair of them may be called different."""

from itertools import combinations
from pathlib import Path

import pytest

from tests.small import write_inputs
from tests.verify.layouts import LAYOUTS, record_all
from trainer.verify.compare import compare


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_pair_of_layouts_is_called_different(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    record_all(tmp_path / "small.yaml", tmp_path, LAYOUTS)
    pairs = list(combinations(LAYOUTS, 2))
    assert len(pairs) >= 50
    found = [compare(tmp_path / one.name, tmp_path / other.name) for one, other in pairs]
    assert not [f"{each.one}, {each.other}: {each.first}" for each in found if not each.same]
    # Nothing was waved through: no choice was a tie, and every phase looked at many readings.
    assert not any(phase.ties or phase.loose for each in found for phase in each.phases)
    assert min(len(phase.measured) for each in found for phase in each.phases[1:]) > 100
