"""The clock of schedules, whichever way its buffer is written."""

import copy

import pytest
import torch

from fairseq_implicit.depth.clock import UpdateCount


def copy_into(count, number):
    with torch.no_grad():
        count.earlier.copy_(torch.tensor(number))


def assign(count, number):
    count.load_state_dict({"earlier": torch.tensor(number)}, assign=True)


def replace(count, number):
    count.earlier = torch.tensor(number)


def load(count, number):
    count.load_state_dict({"earlier": torch.tensor(number)})


@pytest.mark.parametrize("write", [copy_into, assign, replace, load])
def test_the_clock_follows_its_buffer_however_that_is_written(write):
    count = UpdateCount()
    count.set_num_updates(3)
    assert count.value == 3
    for number in (500, 70):
        write(count, number)
        assert count.value == number + 3
    twin = copy.deepcopy(count)
    write(twin, 9)
    assert (twin.value, count.value) == (12, 73)
    twin.set_num_updates(1)
    assert (twin.value, int(twin.earlier)) == (12, 11)


def test_a_clock_made_under_inference_mode_tells_the_time():
    with torch.inference_mode():
        count = UpdateCount()
        count.load_state_dict({"earlier": torch.tensor(8)})
        assert count.value == 8
    assert count.value == 8


def test_the_clock_reads_its_buffer_once_per_change(monkeypatch):
    count, reads = UpdateCount(), []
    read = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(1) or read(tensor))
    load(count, 500)
    for number in range(20):
        count.set_num_updates(number)
        assert count.value == 500 + number
    count.set_num_updates(0)
    assert count.value == 519
    assert len(reads) <= 2, "reading the buffer waits for the device"


def test_a_count_that_is_reached_stands_whole_in_the_buffer(monkeypatch):
    count, reads = UpdateCount(), []
    load(count, 500)
    count.set_num_updates(7)
    read = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(1) or read(tensor))
    for number in range(508, 520):
        count.reach(number)
        assert count.value == number
    assert len(reads) <= 1  # of what was loaded
    assert int(count.state_dict()["earlier"]) == 519
    count.set_num_updates(0)  # fairseq goes on with it
    count.set_num_updates(3)
    assert count.value == 522
