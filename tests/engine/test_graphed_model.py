"""GraphedModel: buffers and order of a captured call, with a replacement of the graph on a CPU."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.engine.graphed_model import GraphedModel
from engine_cases import CPU, arguments, small
from unet_cases import relative_error


@pytest.fixture
def graphed(monkeypatch):
    captures = []

    class Replayed:
        def __init__(self, step, rewind, device, unrolled):
            assert not unrolled
            captures.append(step)
            step()

        def __call__(self, steps=1):
            captures[-1]()

    class Stream:
        def wait_event(self, event):
            assert event == "event"

        def record_event(self):
            return "event"

    monkeypatch.setattr("ddpm_fast.engine.graphed_model.GraphedStep", Replayed)
    monkeypatch.setattr("ddpm_fast.engine.graphed_model.is_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    unet = small(num_class_embeds=5)
    return GraphedModel(unet, CPU), unet, captures


def test_replays_read_new_inputs_and_do_not_overwrite_results(graphed):
    model, unet, captures = graphed
    x, t, labels = arguments(unet.config)
    calls = [(x, t, labels), (2 * x, t + 5, 4 - labels), (x, 3, labels), (x, t, labels)]
    got = [model(*args) for args in calls]
    for y, args in zip(got, calls, strict=True):
        assert relative_error(y, unet(*args)) < 1e-5
    assert len(captures) == 1


def test_another_dtype_is_captured_again(graphed):
    model, unet, captures = graphed
    x, t, labels = arguments(unet.config)
    model(x, t, labels)
    model(x.double(), t, labels)
    model(x.double(), t, labels)
    assert len(captures) == 2


def test_a_failed_capture_keeps_the_old_one(graphed, monkeypatch):
    model, unet, captures = graphed
    x, t, labels = arguments(unet.config)
    model(x, t, labels)

    class Fails:
        def __init__(self, *args, **options):
            raise RuntimeError("out of memory")

    monkeypatch.setattr("ddpm_fast.engine.graphed_model.GraphedStep", Fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x.double(), t, labels)
    assert relative_error(model(x, t, labels), unet(x, t, labels)) < 1e-5
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x.double(), t, labels)
    assert len(captures) == 1


def test_layouts_share_a_capture(graphed):
    model, unet, captures = graphed
    x, t, labels = arguments(unet.config)
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        got = model(x.contiguous(memory_format=layout), t, labels)
        assert relative_error(got, unet(x, t, labels)) < 1e-5
    assert len(captures) == 1


def test_inside_a_capture_the_model_runs_directly(graphed, monkeypatch):
    model, unet, captures = graphed
    monkeypatch.setattr("ddpm_fast.engine.graphed_model.is_capturing", lambda: True)
    args = arguments(unet.config)
    assert relative_error(model(*args), unet(*args)) < 1e-6
    assert not captures
