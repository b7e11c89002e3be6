"""The bits of reverse_step_: its operations one by one, in NumPy.

An fma is rounded once (triton_interpreter); every other operation is NumPy's in float32.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cases import per_sample
from ddpm_fast.ops.row import RowFlag, column
from reverse_step_cases import Inputs
from triton_interpreter import fma32


def _float32(text: str) -> np.ndarray:
    return np.asarray(float.fromhex(text), dtype=np.float32)


def _pow2(n: np.ndarray) -> np.ndarray:
    return ((n + 127) << 23).astype(np.int32).view(np.float32)


def exponential(x: np.ndarray) -> np.ndarray:
    """float32 e^x, by the constants of csrc/core in hexadecimal."""
    with np.errstate(all="ignore"):
        x = np.where(x < -104, np.float32(-104), x)
        x = np.where(x > 89, np.float32(89), x)
        magic = _float32("0x1.8p23")
        shifted = fma32(x, _float32("0x1.715476p+0"), magic)
        k = (shifted.view(np.uint32) - np.uint32(0x4B400000)).view(np.int32)
        kf = shifted - magic
        r = fma32(kf, _float32("-0x1.62p-1"), x)
        r = fma32(kf, _float32("-0x1.c85fep-10"), r)
        q = _float32("0x1.6a5228p-10")
        for constant in ("0x1.12396cp-7", "0x1.5558aap-5", "0x1.555492p-3", "0x1.fffffcp-2"):
            q = fma32(q, r, _float32(constant))
        p = np.float32(1) + fma32(r * r, q, r)
        half = k >> 1
        return (p * _pow2(half)) * _pow2(k - half)


class _Row:
    """The coefficients of each sample, and the sums that an update makes with them."""

    def __init__(self, rows: Tensor, step: Tensor, like: Tensor) -> None:
        self._row, self._like = rows[step.clamp(0, len(rows) - 1)], like

    def __getitem__(self, name: str) -> np.ndarray:
        return per_sample(self._row[:, column(name)], self._like).numpy()

    def sum(self, **values: np.ndarray) -> np.ndarray:
        """Coefficients times values: a product, then an fma for each of the rest."""
        (first, value), *rest = values.items()
        total = self[first] * value
        for name, value in rest:
            total = fma32(self[name], value, total)
        return total


def bits_of_step(before: Inputs) -> dict[str, Tensor]:
    """Return the tensors that a step with input noise writes, by name."""
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in before.items()}
    with np.errstate(all="ignore"):
        values = _next_values(on_cpu)
    step = on_cpu["step"]
    runs = (step >= 0) & (step < len(on_cpu["rows"]))
    found = {
        name: on_cpu[name]
        .clone()
        .copy_(torch.where(per_sample(runs, value), value, on_cpu[name].float()))
        for name, value in values.items()
        if name != "pushed"
    }
    if on_cpu["history"] is not None:
        found["history"] = on_cpu["history"].clone()
        for n, row in enumerate(on_cpu["rows"][step.clamp(0, len(on_cpu["rows"]) - 1)]):
            if runs[n] and row[column("push")] and on_cpu["flags"] & RowFlag.PUSH:
                found["history"][int(row[column("slot")]), n] = values["pushed"][n]
    return found


def _next_values(inputs: Inputs) -> dict[str, Tensor]:
    """Return the results of every sample in float32, in the table or not."""
    flags = RowFlag(inputs["flags"])
    row = _Row(inputs["rows"], inputs["step"], inputs["x"])
    x, o, z = (inputs[name].float().numpy() for name in ("x", "model_output", "noise"))
    if RowFlag.GUIDE in flags:
        o = row.sum(G0=o, G1=inputs["model_output2"].float().numpy())
    direct = row["P"] == 0
    x0 = np.where(direct, row["Q"], row["P"]) * np.where(direct, o, fma32(row["ratio"], o, x))
    if flags & (RowFlag.CLIP | RowFlag.THRESHOLD):
        divides = RowFlag.THRESHOLD in flags
        bound = per_sample(inputs["threshold"], inputs["x"]).numpy() if divides else row["clip"]
        x0 = np.where(x0 < -bound, -bound, x0)
        x0 = np.where(x0 > bound, bound, x0)
        x0 = x0 / bound if divides else x0
    if RowFlag.LEARNED in flags:
        half, v = np.float32(0.5), inputs["log_variance"].float().numpy()
        z = exponential(fma32(v, half * (row["Lmax"] - row["Lmin"]), half * row["Lmin"])) * z
    y = inputs["second"].numpy() if RowFlag.SECOND in flags else None
    past = _past_values(inputs)
    x_coef = {"Xo": o} if RowFlag.RAW_OUT in flags else {}
    x_coef |= {} if y is None else {"Xy": y}
    x_coef |= {f"Xh{k}": h for k, h in past.items()}
    next_x = row.sum(Xx=x, Xx0=x0, **x_coef, S=z)
    values = {"x": next_x, "pred_x0": x0}
    values["model_input"] = row["Cin"] * next_x if RowFlag.SCALE_IN in flags else next_x
    if y is not None:
        values["second"] = row.sum(Yx=x, Yx0=x0, Yy=y, **{f"Yh{k}": h for k, h in past.items()})
    of_h0 = {"Ho": o} if RowFlag.PUSH_OUT in flags else {}
    values["pushed"] = row.sum(Hx=x, Hv=x0, **of_h0)
    return {name: torch.from_numpy(value) for name, value in values.items()}


def _past_values(inputs: Inputs) -> dict[int, np.ndarray]:
    """h_k by k, those that the flags say are read."""
    read = [k for k in (1, 2, 3) if inputs["flags"] & RowFlag[f"H{k}"]]
    if not read:
        return {}
    rows, history = inputs["rows"], inputs["history"]
    slot = rows[inputs["step"].clamp(0, len(rows) - 1), column("slot")].long()
    samples = torch.arange(len(slot))
    return {k: history[(slot - k) % len(history), samples].numpy() for k in read}
