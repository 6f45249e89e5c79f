"""How a batch is divided: every sample once, in order, and equally many parts for each process."""

from __future__ import annotations

import pytest
import torch

from secateur.tasks.training.division import divide_batch, process_seed


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_every_sample_is_in_one_part(processes: int, micro_batches: int, count: int) -> None:
    rows = torch.arange(100, 100 + count)
    divided = divide_batch(rows, processes, micro_batches)
    assert len(divided) == processes
    assert len({len(parts) for parts in divided}) == 1
    parts = [part for own in divided for part in own]
    assert torch.cat([part.rows for part in parts if not part.is_idle]).equal(rows)
    assert all(len(part.rows) == 1 for part in parts if part.is_idle)
    sizes = [sum(len(part.rows) for part in own if not part.is_idle) for own in divided]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_has_the_parts_that_torch_cuts() -> None:
    rows = torch.arange(10)
    (parts,) = divide_batch(rows, 1, 4)
    assert [part.rows.tolist() for part in parts] == [part.tolist() for part in rows.chunk(4)]


def test_seeds_differ_and_the_first_is_that_of_one_process() -> None:
    seeds = [process_seed(7, rank) for rank in range(4)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 4
