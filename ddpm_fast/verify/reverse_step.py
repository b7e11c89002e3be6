"""Checks of reverse steps with every kind of row against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import DynamicThreshold
from ddpm_fast.ops import reference
from ddpm_fast.ops.philox import STREAM_STEPS, philox_rng
from ddpm_fast.ops.row import RowFlag, column
from ddpm_fast.sampling.reverse_step import thresholds
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.verify.cases import Case, Results

Operate = Callable[[Case, NoiseSchedule], Results]


def step_operators(schedule: NoiseSchedule) -> Iterator[tuple[str, Operate]]:
    """Yield name and check of a step of every kind of table."""
    ddpm, ddim = StepTable.ddpm(schedule), StepTable.ddim(schedule, 50, rederive_epsilon=False)
    x0_predicted = StepTable.ddpm(schedule, prediction="x0")
    learned = StepTable.ddpm(schedule, variance="learned_range")
    dynamic = StepTable.ddim(schedule, 50, clip=DynamicThreshold(0.8))
    yield "reverse_step ddpm, noise given", _step(ddpm)
    yield "reverse_step ddpm, noise made", _step(ddpm, generated=True)
    yield "reverse_step ddpm, no clip", _step(StepTable.ddpm(schedule, clip=None))
    yield "reverse_step ddpm, x0 predicted", _step(x0_predicted)
    yield "reverse_step ddpm, learned", _step(learned)
    yield "reverse_step ddim, raw epsilon", _step(ddim)
    yield "reverse_step ddim, guided", _step(ddim.with_guidance(2.5))
    yield "reverse_step ddim, thresholded", _step(dynamic)
    yield "reverse_step dpmpp_2m_sde", _step(StepTable.dpmpp_2m_sde(schedule, 20))
    yield "reverse_step unipc", _step(StepTable.unipc(schedule, 20))
    yield "reverse_step plms", _step(StepTable.plms(schedule, 20))
    yield "reverse_step functional, ddpm", _functional_step(ddpm)
    yield "reverse_step functional, x0 predicted", _functional_step(x0_predicted)
    yield "reverse_step functional, raw epsilon", _functional_step(ddim)
    yield "reverse_step functional, thresholded", _functional_step(dynamic)
    yield "reverse_step functional, learned", _functional_step(learned)


def _step(table: StepTable, generated: bool = False) -> Operate:
    def run(case: Case, schedule: NoiseSchedule) -> Results:
        state = case.arithmetic
        x, out = case.tensor(0, state, written=True), case.tensor(1)
        rows, _ = table.to(case.device, state)
        step = case.indices(3, table.steps)
        rng = philox_rng(11, STREAM_STEPS, 5, case.device) if generated else None
        second, history = table.memory(x)
        for memory, seed in ((second, 4), (history, 5)):
            if memory is not None:
                memory.copy_(case.tensor(seed, state).expand_as(memory))
        inputs: dict[str, Any] = {
            "x": x,
            "model_output": out,
            "rows": rows,
            "step": step,
            "noise": case.tensor(2, state) if table.uses_noise and not generated else None,
            "rng": rng,
            "model_input": torch.full_like(x, float("nan"), dtype=case.dtype),
            "pred_x0": torch.full_like(x, float("nan")),
            "flags": int(table.flags),
            "model_output2": case.tensor(6) if table.guided else None,
            "log_variance": case.tensor(7) if table.learned else None,
            "threshold": None,
            "second": second,
            "history": history,
        }
        if table.threshold is not None:
            out2 = inputs["model_output2"]
            inputs["threshold"] = thresholds(table.threshold, x, out, out2, rows, step)
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        case.run.reverse_step_(**inputs)
        if rng is not None:
            before |= {"noise": case.generated_noise(before["x"], step, rng), "rng": None}
        computed, sums = _reference_step(before, table), _magnitudes(before, table)
        written = [k for k in ("x", "pred_x0", "second", "history") if inputs[k] is not None]
        outputs = [inputs["model_input"], *(inputs[name] for name in written)]
        exact, terms = ([of[name] for name in ("x", *written)] for of in (computed, sums))
        return outputs, exact, terms

    return run


def _functional_step(table: StepTable) -> Operate:
    def run(case: Case, schedule: NoiseSchedule) -> Results:
        x, out = case.tensor(0), case.tensor(1)
        rows, _ = table.to(case.device, case.arithmetic)
        step = case.indices(3, table.steps)
        inputs: dict[str, Any] = {
            "x": x,
            "model_output": out,
            "rows": rows,
            "step": step,
            "noise": case.tensor(2) if table.uses_noise else None,
            "flags": int(table.flags),
            "log_variance": case.tensor(7) if table.learned else None,
            "threshold": None,
        }
        if table.threshold is not None:
            state = x.to(case.arithmetic)
            inputs["threshold"] = thresholds(table.threshold, state, out, None, rows, step)
        outputs = list(case.run.reverse_step(**inputs))
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        before |= {"rng": None, "pred_x0": torch.empty_like(before["x"])}
        computed, sums = _reference_step(before, table), _magnitudes(before, table)
        exact, terms = ([of["x"], of["pred_x0"]] for of in (computed, sums))
        return outputs, exact, terms

    return run


def _reference_step(before: dict[str, Any], table: StepTable) -> dict[str, Any]:
    """Run the step in float64 on the CPU, with rows that are not rounded to float32."""
    inputs: dict[str, Any] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in before.items()}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = value.double()
    inputs |= {"rows": table.rows, "model_input": None}
    reference.reverse_step_(**inputs)
    return inputs


def _magnitudes(before: dict[str, Any], table: StepTable) -> dict[str, Any]:
    """Return the results of the step with absolute values and no clipping: no term cancels."""
    inputs: dict[str, Any] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in before.items()}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = value.double() if name == "log_variance" else value.double().abs()
    rows = table.rows
    exponents = rows[:, [column("Lmin"), column("Lmax")]]
    rows = rows.abs()
    rows[:, [column("Lmin"), column("Lmax")]] = exponents
    if (v := inputs["log_variance"]) is not None and v.numel():
        # An error of the exponent is a relative error of the exponential.
        rows[:, column("S")] *= 2 + exponents.abs().sum(1) * (1 + float(v.abs().max()))
    flags = inputs["flags"] & ~int(RowFlag.CLIP | RowFlag.THRESHOLD)
    inputs |= {"rows": rows, "model_input": None, "threshold": None, "flags": flags}
    reference.reverse_step_(**inputs)
    return inputs
