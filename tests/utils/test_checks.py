"""Argument checks: what is accepted, and the one form of the message for what is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ddpm_fast.utils import checks, in_place

X = torch.zeros(2, 3, 4, 4)
INT = "x must be an integer in [0, 9]; got "

BAD = [
    pytest.param(checks.integer, (10, 0, 10), ValueError, INT + "10", id="integer-above"),
    pytest.param(checks.integer, (-1, 0, 10), ValueError, INT + "-1", id="integer-below"),
    pytest.param(checks.integer, (2.0, 0, 10), TypeError, INT + "2.0 (float)", id="integer-float"),
    pytest.param(checks.integer, (True, 0, 10), TypeError, INT + "True (bool)", id="integer-bool"),
    pytest.param(checks.integer, ("1", 0, 10), TypeError, INT + "'1' (str)", id="integer-str"),
    pytest.param(checks.integer, (None, 0, 10), TypeError, INT + "NoneType", id="integer-none"),
    pytest.param(
        checks.integer, (0, 1), ValueError, "x must be an integer >= 1; got 0", id="no-upper-limit"
    ),
    pytest.param(
        checks.real, (0, 0, 1, "(]"), ValueError, "x must be a number in (0, 1]; got 0.0", id="open"
    ),
    pytest.param(
        checks.real,
        (2, 0, 1, "[]"),
        ValueError,
        "x must be a number in [0, 1]; got 2.0",
        id="above",
    ),
    pytest.param(
        checks.real, (math.nan,), ValueError, "x must be a number in (-inf, inf); got nan", id="nan"
    ),
    pytest.param(
        checks.real, (math.inf,), ValueError, "x must be a number in (-inf, inf)", id="infinite"
    ),
    pytest.param(
        checks.real, ("1",), TypeError, "x must be a number in (-inf, inf); got '1' (str)", id="str"
    ),
    pytest.param(checks.real, (True,), TypeError, "got True (bool)", id="real-bool"),
    pytest.param(
        checks.choice, ("c", ("a", "b")), ValueError, "x must be one of a, b; got 'c'", id="choice"
    ),
    pytest.param(
        checks.choice, (1, ("a",)), ValueError, "x must be one of a; got 1", id="choice-int"
    ),
    pytest.param(checks.instance, (1, dict), TypeError, "x must be a dict; got int", id="instance"),
    pytest.param(checks.device, ("gpu",), ValueError, "x must be a device, such as", id="device"),
    pytest.param(
        checks.sample_shape, (3,), TypeError, "x must be a sequence of ints", id="shape-int"
    ),
    pytest.param(
        checks.sample_shape,
        ((3, -1),),
        ValueError,
        "x must have no negative size",
        id="shape-minus",
    ),
    pytest.param(
        checks.batch, ([1],), TypeError, "x must be a torch.Tensor; got list", id="batch-list"
    ),
    pytest.param(
        checks.batch,
        (X.to_sparse(),),
        TypeError,
        "x must be a strided tensor; got layout torch.sparse_coo",
        id="batch-sparse",
    ),
    pytest.param(
        checks.batch,
        (X.int(), (torch.float32, torch.float16)),
        TypeError,
        "x must be float32, float16; got int32",
        id="batch-dtype",
    ),
    pytest.param(
        checks.batch, (torch.tensor(1.0),), ValueError, "x must have a batch dimension", id="0-d"
    ),
    pytest.param(
        checks.batch,
        (X, checks.FLOATS, (2, "C", 5, 4)),
        ValueError,
        "x must be [2, C, 5, 4]; got [2, 3, 4, 4]",
        id="batch-shape",
    ),
    pytest.param(
        checks.images, (X[0],), ValueError, "x must be [N, C, H, W]; got [3, 4, 4]", id="images"
    ),
    pytest.param(
        checks.floating,
        (X.int(),),
        TypeError,
        "x must be a floating-point tensor; got int32",
        id="floating",
    ),
    pytest.param(
        checks.like,
        (X[:1], "other", X, checks.FLOATS),
        ValueError,
        "x must have the shape of other, [2, 3, 4, 4]; got [1, 3, 4, 4]",
        id="like",
    ),
    pytest.param(
        checks.same_device,
        (X.to("meta"), "other", X),
        ValueError,
        "x must be on the device of other, cpu; got meta",
        id="same-device",
    ),
    pytest.param(checks.index, (10, X, 10), ValueError, INT + "10", id="index"),
    pytest.param(checks.index, (torch.tensor([1, 10]), X, 10), ValueError, INT + "10", id="values"),
    pytest.param(
        checks.index,
        (torch.tensor([1, 2, 3]), X, 10),
        ValueError,
        "x must have one value for each of 2 samples; got [3]",
        id="index-shape",
    ),
    pytest.param(
        checks.index, (1.5, X, 10), TypeError, "x must be an integer or an int64", id="index-float"
    ),
    pytest.param(
        checks.index,
        (torch.zeros(2, dtype=torch.int64, device="meta"), X, 10),
        ValueError,
        "x must be on the device of the samples, cpu; got meta",
        id="index-device",
    ),
    pytest.param(
        in_place.writable, (X[:1].expand_as(X),), ValueError, "x is written in place", id="expanded"
    ),
    pytest.param(
        in_place.writable, (X.clone().requires_grad_(),), ValueError, "require grad", id="grad"
    ),
]


@pytest.mark.parametrize(("check", "arguments", "error", "message"), BAD)
def test_a_bad_argument_is_named_with_what_is_accepted(check, arguments, error, message):
    with pytest.raises(error) as raised:
        check("x", *arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        pytest.param(-1, ValueError, "labels must be an integer in [0, ", id="negative"),
        pytest.param(1.5, TypeError, "labels must be an integer in [0, ", id="float"),
        pytest.param(X[:1], ValueError, "labels must be an integer or a tensor [2, ...]", id="num"),
    ],
)
def test_bad_labels_are_named(labels, error, message):
    with pytest.raises(error) as raised:
        checks.sample_labels(labels, 2, torch.device("cpu"))
    assert message in str(raised.value)


def test_what_is_accepted_is_converted():
    assert checks.integer("x", np.int64(3), 0) == 3
    assert type(checks.integer("x", np.uint8(3), 0)) is int
    assert checks.real("x", np.float32(0.5), 0, 1, "[]") == 0.5
    assert [checks.real("x", end, 0, 1, "[]") for end in (0, 1)] == [0.0, 1.0]
    assert checks.device("x", "cpu") == torch.device("cpu")
    assert checks.sample_shape("x", torch.Size([3, 4])) == (3, 4)
    assert checks.index("x", 4, X, 5).tolist() == [4, 4]
    assert checks.index("x", torch.tensor(4, dtype=torch.int32), X, 5).tolist() == [4, 4]
    assert checks.index("x", torch.tensor([-7, 9]), X, None).tolist() == [-7, 9]
    assert checks.sample_labels(4, 2, torch.device("cpu")).tolist() == [4, 4]
    assert checks.sample_labels(None, 2, torch.device("cpu")) is None
    for value in (np.array([1, 2]), torch.tensor([1, 2]), (1, 2)):
        assert checks.as_list(value) == [1, 2]
    assert checks.as_list("ab") == "ab"
    assert checks.as_list(3) == 3


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64)]
    + [(d, torch.float32) for d in (torch.float32, torch.float16, torch.bfloat16)],
    ids=str,
)
def test_halves_are_computed_in_float32(dtype, expected):
    assert checks.compute_dtype(dtype) == expected


def test_only_another_view_of_written_memory_is_copied():
    x = torch.arange(12.0).view(3, 4)
    assert in_place.without_overlap(x, x) is x
    assert in_place.without_overlap(x, None, torch.empty(3, 4)) is x
    assert in_place.without_overlap(x[1:], x[:1]).data_ptr() == x[1:].data_ptr()
    for view in (x.t(), x[1:], x[2, 3:], x.view(torch.int32)):
        assert in_place.without_overlap(view, x).data_ptr() != view.data_ptr()


def test_tensors_that_are_written_must_be_distinct():
    x = torch.zeros(2, 3)
    in_place.distinct(a=x, b=x.clone(), c=None)
    in_place.distinct(a=x[:0], b=x[:0])
    with pytest.raises(ValueError, match="b must not share memory with a; both are written"):
        in_place.distinct(a=x, b=x)
