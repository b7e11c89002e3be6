"""UNetEngine against its network: configurations, dtypes, memory, arguments."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import threading
import weakref

import pytest
import torch

from cases import BF16, F16, F32, F64, SCHEDULE, same_bits
from conv_cases import error
from ddpm_fast import Sampler, StepTable, Tuner, UNet, UNetConfig, UNetEngine
from ddpm_fast.bench import networks
from ddpm_fast.engine.plan import binding as steps
from ddpm_fast.engine.plan import memory_check
from ddpm_fast.engine.plan.embeddings import LabelledEmbeddings
from ddpm_fast.engine.plan.lowering import lower
from engine_cases import CPU, arguments, engine, small
from unet_cases import CIFAR, CONFIGS, SMALL, relative_error

OFF = Tuner(CPU, mode="off")
# Configurations whose plans differ most: each has operations that the others lack.
MAIN = {"scale-shift", "resample-by-resnet", "class-timestep", "odd-widths", "narrow-cifar10"}


def cases(chosen):
    """Both places of the residual's sum for some configurations, one for the others."""
    return [
        pytest.param(*config.values, norms_add, id=f"{config.id}-{name}")
        for config in CONFIGS
        for norms_add, name in ((True, "norms-add"), (False, "convs-add"))
        if chosen(config.id, norms_add)
    ]


@pytest.mark.parametrize(
    ("options", "norms_add"), cases(lambda name, norms_add: norms_add or name in MAIN)
)
def test_the_plan_computes_the_network(options, norms_add):
    unet = small(**options).double()
    args = arguments(unet.config)
    run = engine(unet, args[0], F64, backend="reference", norms_add=norms_add)
    got = run(args[0].double(), *args[1:])
    assert relative_error(got, unet(args[0].double(), *args[1:])) < 1e-13


@pytest.mark.parametrize(("options", "norms_add"), cases(lambda name, norms_add: name in MAIN))
def test_the_kernels_run_the_plan(options, norms_add):
    unet = small(**options)
    args = arguments(unet.config)
    got = engine(unet, args[0], norms_add=norms_add)(*args)
    reference = unet.double()(args[0].double(), *args[1:])
    assert got.dtype == F32
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(got, reference) < 3e-5


NARROW = CIFAR | {"block_out_channels": (32, 64, 64, 64)}
SCALE_SHIFT = SMALL | {"resnet_time_scale_shift": "scale_shift"}


@pytest.mark.parametrize(
    ("dtype", "options", "batch", "norms_add"),
    [
        pytest.param(F16, SMALL, 3, True, id="float16"),
        pytest.param(BF16, SMALL, 1, False, id="bfloat16"),
        pytest.param(F16, SCALE_SHIFT, 1, False, id="float16-scale-shift"),
        pytest.param(BF16, SCALE_SHIFT, 3, True, id="bfloat16-scale-shift"),
        pytest.param(BF16, NARROW, 1, True, id="bfloat16-narrow"),
        pytest.param(F16, NARROW, 3, False, id="float16-narrow", marks=pytest.mark.slow),
    ],
)
def test_half_precision_error_is_at_most_twice_that_of_diffusers(dtype, options, batch, norms_add):
    diffusers = pytest.importorskip("diffusers")
    unet = networks.even(UNet(**options))
    original = diffusers.UNet2DModel(**unet.config.to_dict())
    original.load_state_dict(unet.state_dict())
    x, t = arguments(unet.config, num=batch)
    x = x.to(dtype)
    with torch.no_grad():
        reference = unet.double()(x.double(), t)
        theirs = error(original.to(dtype).eval()(x, t).sample, reference)
        ours = error(engine(unet.float(), x, dtype, norms_add=norms_add)(x, t), reference)
    assert ours <= 2 * theirs


def test_timesteps_of_any_kind():
    unet = small()
    x, _ = arguments(unet.config)
    run = engine(unet, x)
    each = run(x, torch.full((3,), 7))
    assert same_bits(run(x, 7), each)
    assert same_bits(run(x, torch.tensor(7)), each)
    assert same_bits(run(x, torch.full((3,), 7, dtype=torch.int32)), each)
    mixed = run(x, torch.tensor([7, 900, 0]))
    assert same_bits(mixed[0], each[0])
    assert not same_bits(mixed[1], each[1])


def test_images_of_any_layout_and_dtype():
    unet = small()
    x, t = arguments(unet.config)
    x = x.half()  # values that every dtype represents
    run = engine(unet, x)
    expected = run(x.float(), t)
    layouts = {
        F16: x,
        F32: x.float().contiguous(memory_format=torch.channels_last),
        F64: torch.nn.functional.pad(x.double(), (1, 2))[..., 1:-2],
    }
    for dtype, image in layouts.items():
        got = run(image, t)
        assert got.dtype == dtype
        assert same_bits(got, expected.to(dtype)), dtype


def test_kernels_get_dense_aligned_images(monkeypatch):
    """Some kernels read by address and shape and ignore strides."""
    unet = small()
    x, t = arguments(unet.config)
    run = engine(unet, x)
    expected = run(x, t)
    got = []
    first = run._steps[0]

    def step(slots):
        image = slots[run._x_slot]
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert image.data_ptr() % 16 == 0
        got.append(image)
        first.run(slots)

    monkeypatch.setattr(run, "_steps", [first._replace(run=step), *run._steps[1:]])
    n, c, h, w = x.shape
    for shape, offset in (((n, h, w, c + 3), 0), ((n, h + 2, w + 1, c), 0), ((n, h, w, c), 1)):
        memory = torch.zeros(offset + math.prod(shape))
        view = memory[offset:].view(shape).permute(0, 3, 1, 2)[:, :c, :h, :w]
        view.copy_(x)
        assert same_bits(run(view, t), expected)
    assert len(got) == 3


def test_results_do_not_depend_on_reused_memory():
    unet = small()
    x, t = arguments(unet.config)
    run = engine(unet, x)
    first = run(x, t)
    result = first.clone()
    (slots,) = run._free
    for slot, value in run._values.items():
        slots[slot].fill_(255 if value.dtype == torch.uint8 else float("nan"))
    assert same_bits(run(x, t), result)
    run(x * 2, t)
    assert same_bits(first, result)  # results are not overwritten


def test_concurrent_calls_do_not_share_memory():
    unet = small()
    x, t = arguments(unet.config)
    run = engine(unet, x)
    images = [x * scale for scale in (0.5, 1, 2, 3)]
    expected = [run(image, t) for image in images]
    failures = []

    def work(image, want):
        for _ in range(20):
            if not same_bits(run(image, t), want):
                failures.append(image)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(images, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(run._free) <= len(threads)


def test_a_thread_that_loses_the_last_free_memory_allocates():
    unet = small()
    x, t = arguments(unet.config)
    run = engine(unet, x)
    expected = run(x, t)

    class Contested(list):
        def __bool__(self):
            return True  # as seen before another thread took the last one

        def __len__(self):
            return 1

    run._free = Contested()
    assert same_bits(run(x, t), expected)


def test_kernels_that_split_sums_do_not_share_locks(monkeypatch):
    seen = []

    class Splits:
        name, split_k_locks = "splits", 5

        def __init__(self, variant):
            self.variant = variant
            self.workspace_bytes = variant.workspace_bytes

        def __call__(self, *args, split_k_locks):
            assert split_k_locks.dtype == torch.int32
            assert split_k_locks.tolist() == [0] * 5
            seen.append((split_k_locks.data_ptr(), split_k_locks.data_ptr() + 20))
            self.variant(*args)

    original = steps.fastest
    monkeypatch.setattr(steps, "fastest", lambda *args: Splits(original(*args)))
    unet = small()
    x, t = arguments(unet.config)
    run = engine(unet, x)
    run(x, t)
    convolutions = sum(op.kind.startswith("conv") for op in run.plan().operations)
    assert len(seen) == convolutions
    ordered = sorted(seen)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))


def test_inference_mode_and_grad_mode_share_memory():
    unet = small()
    x, t = arguments(unet.config)
    run = engine(unet, x)
    with torch.inference_mode():
        inside = run(x.clone(), t)
    assert same_bits(run(x, t), inside)
    assert not run(x, t).requires_grad


def test_the_weights_are_a_copy():
    unet = small(num_class_embeds=5)
    args = arguments(unet.config)
    run = engine(unet, args[0])
    before = run(*args)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    assert same_bits(run(*args), before)
    freed = weakref.ref(unet.conv_in.weight.untyped_storage())
    del unet, parameter
    gc.collect()
    assert freed() is None  # no parameter of the network is kept alive


def test_nan_reaches_the_output_of_its_image_alone():
    unet = small()
    x, t = arguments(unet.config)
    x[1, 0, 0, 0] = float("nan")
    out = engine(unet, x)(x, t)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_a_sampler_runs_the_engine_in_place_of_the_network():
    unet = small(in_channels=3, out_channels=3)
    table = StepTable.ddim(SCHEDULE, 5)
    run = UNetEngine(unet, 4, (4, 8), F32, tuner=OFF)
    sampler = Sampler(run, table, (3, 4, 8), micro_batch=4)
    assert (sampler.device, sampler.dtype) == (run.device, F32)
    expected = Sampler(unet, table, (3, 4, 8), micro_batch=4).sample(6, progress=False)
    assert relative_error(sampler.sample(6, progress=False), expected) < 1e-4
    with pytest.raises(ValueError, match=r"x must be \[4, 3, 4, 8\], as the engine was planned"):
        Sampler(run, table, (3, 4, 8), micro_batch=3).sample(1, progress=False)


def test_a_copy_is_the_engine_itself_and_pickling_raises():
    unet = small()
    x, _ = arguments(unet.config)
    run = engine(unet, x)
    assert copy.deepcopy(run) is run
    with pytest.raises(TypeError, match="cannot be pickled; pickle the UNet"):
        pickle.dumps(run)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"batch": 0}, ValueError, r"batch must be an integer in \[1, .*got 0"),
            ({"batch": 2.0}, TypeError, r"batch must be an integer in .*; got 2.0 \(float\)"),
            ({"image_size": 7}, ValueError, "image_size must be multiples of 2; got 7"),
            ({"image_size": (8, 8, 8)}, ValueError, r"image_size must be a side or \(height"),
            ({"dtype": torch.int8}, TypeError, "dtype must be float16, .*; got int8"),
            ({"dtype": F64}, TypeError, "float64 with backend 'reference'; got float64"),
            (
                {"backend": "best"},
                ValueError,
                "backend must be one of auto, reference, .*; got 'best'",
            ),
            ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run: it runs on CUDA"),
            ({"num_timesteps": 0}, ValueError, r"num_timesteps must be an integer in \[1, .*got 0"),
            ({"tuner": Tuner(torch.device("cuda"))}, ValueError, "tuner must be for cpu.*cuda"),
            ({"unet": torch.nn.Identity()}, TypeError, "unet must be a .*UNet; got Identity"),
        ],
    )
    def test_construction(self, change, error, message):
        options = {"unet": small(), "batch": 2, "image_size": 8, "dtype": F32} | change
        with pytest.raises(error, match=message):
            UNetEngine(**options)

    @pytest.mark.parametrize(
        ("args", "error", "message"),
        [
            ((torch.zeros(2, 2, 8, 8), 0), ValueError, r"x must be \[3, 2, 8, 8\].*got \[2, 2"),
            ((torch.zeros(3, 2, 8, 8, dtype=torch.int64), 0), TypeError, "x must be a floating"),
            (("x", 0), TypeError, "x must be a floating-point tensor; got str"),
            ((torch.zeros(3, 2, 8, 8, device="meta"), 0), ValueError, "x must be on cpu"),
            (
                (torch.zeros(3, 2, 8, 8), 1000),
                ValueError,
                r"t must be an integer in \[0, 999\]; got 1000",
            ),
            (
                (torch.zeros(3, 2, 8, 8), torch.tensor([0, -1, 5])),
                ValueError,
                "t must be an integer .*-1",
            ),
            ((torch.zeros(3, 2, 8, 8), 0.5), TypeError, "t must be an integer"),
            ((torch.zeros(3, 2, 8, 8), 0, torch.zeros(3)), ValueError, "class_labels must be None"),
        ],
    )
    def test_calls(self, args, error, message):
        run = engine(small(), torch.zeros(3, 2, 8, 8))
        with pytest.raises(error, match=message):
            run(*args)
        assert run(torch.zeros(3, 2, 8, 8), 0).isfinite().all()

    def test_embeddings_of_timesteps_out_of_range_are_nan(self):
        """A GPU's timesteps are not checked; nothing beyond the table is read."""
        unet = small(num_class_embeds=5)
        projections = lower(unet, 4, 8, 8, F32, norms_add=False)[1]
        embed = LabelledEmbeddings(unet, projections, 10, torch.empty(0))
        out = torch.empty(4, projections.width)
        embed(out, torch.tensor([0, 10, -1, 9]), torch.zeros(4, unet.config.time_channels))
        assert out[[0, 3]].isfinite().all()
        assert out[[1, 2]].isnan().all()

    def test_missing_labels(self):
        unet = small(num_class_embeds=5)
        x, t, _ = arguments(unet.config)
        with pytest.raises(ValueError, match="class_labels must be given"):
            engine(unet, x)(x, t)

    def test_a_batch_that_does_not_fit(self, monkeypatch):
        """The error names the largest batch that fits; the embedding table counts."""
        unet = small()

        def make(batch, num_timesteps=100):
            return UNetEngine(unet, batch, 8, F32, num_timesteps=num_timesteps, tuner=OFF)

        program, projections = lower(unet, 10, 8, 8, F32, norms_add=False)
        need = memory_check.needed_bytes(program) + 4 * 100 * projections.width
        monkeypatch.setattr(memory_check, "free_bytes", lambda device: need)
        make(10)
        with pytest.raises(MemoryError, match="batch 10 needs"):
            make(10, num_timesteps=101)
        with pytest.raises(MemoryError, match="a micro-batch of 10 would fit"):
            make(11)
        with pytest.raises(MemoryError, match=r"batch 64 needs .* GB on cpu, .*-batch of 10 would"):
            make(64)
        monkeypatch.setattr(memory_check, "free_bytes", lambda device: 1000)
        with pytest.raises(MemoryError, match="not even one image would fit"):
            make(64)
        monkeypatch.setattr(memory_check, "free_bytes", lambda device: None)
        make(64)  # unknown free memory is not checked

    def test_free_memory_is_within_the_machine_and_its_control_group(self, monkeypatch):
        cpu = torch.device("cpu")
        assert 0 < memory_check.free_bytes(cpu) < 1 << 50
        monkeypatch.setattr(
            memory_check, "_number", lambda path: 5000 if path.endswith("max") else 2000
        )
        assert memory_check.free_bytes(cpu) == 3000


def test_num_timesteps_of_the_network():
    unet = UNet(UNetConfig.from_dict(SMALL | {"num_train_timesteps": 10})).eval()
    run = engine(unet, torch.zeros(1, 2, 8, 8))
    assert run.num_timesteps == 10
    with pytest.raises(ValueError, match=r"t must be an integer in \[0, 9\]"):
        run(torch.zeros(1, 2, 8, 8), 10)
