"""Runs of the TensorRT engine without a GPU, on a fake CUDA that refuses undefined behaviour."""

import gc
import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from infer.engines import IN_FLIGHT, cudart
from infer.engines.cudart import CudaError
from infer.engines.tensorrt_engine import TensorRTEngine, user_error
from infer.engines.tensorrt_plan import Profile
from isic.runtime.errors import UserError
from tests.support.fake_cuda import FakeCuda, fake_network
from tests.support.tensorrt_plans import (
    FakePlan,
    assert_outputs,
    engine_of,
    fake_engine,
    fake_engines,
    pictures,
)

FOLDS = (0, 1, 4)
SIZES = (0, 1, 2, 3, 8, 9, 16, 17, 24, 61)
"""Batches below, in and above the profile, with and without a tail."""


def page_locked(cuda: FakeCuda, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Lock images as the pipeline does, through the driver."""
    if images.size:
        cuda.register(images)
    return images


def assert_right(engine: TensorRTEngine, number: int) -> None:
    """Run pictures and compare the results of all folds with their networks'."""
    images = pictures(number, seed=number)
    assert_outputs(engine.submit(images).result(), images)


def sizes_on_device(cuda: FakeCuda) -> list[int]:
    return [array.size for array in cuda.device.values()]


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_batches_of_any_size_are_right(
    cuda: FakeCuda, cuda_graph: bool, locked: bool, dtype: str
) -> None:
    """Every piece is computed from its own images, in any order of the two streams."""
    engine, _ = fake_engine(cuda, FOLDS, cuda_graph=cuda_graph, dtype=dtype)
    for number in SIZES:
        images = pictures(number, seed=number)
        if locked:
            images = page_locked(cuda, images)
        outputs = engine.submit(images).result()
        assert list(outputs) == list(FOLDS)
        assert_outputs(outputs, images, dtype)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_masks_are_right(cuda: FakeCuda, cuda_graph: bool) -> None:
    engine, _ = fake_engine(cuda, cuda_graph=cuda_graph)
    for number in SIZES:
        images = pictures(number)
        mask = engine.run_other(images, "mask")
        assert mask.dtype == np.float32
        np.testing.assert_array_equal(mask, fake_network(images)["mask"])
        features, _ = engine.run(images)
        np.testing.assert_array_equal(features, fake_network(images)["features"])


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_auxiliary_logits_are_right(cuda: FakeCuda, cuda_graph: bool) -> None:
    engine, _ = fake_engine(cuda, FOLDS, cuda_graph=cuda_graph, aux=True)
    for number in SIZES:
        images = pictures(number, seed=number)
        outputs = engine.submit(images).result()
        assert {len(values) for values in outputs.values()} == {3}
        assert_outputs(outputs, images)
    single, _ = fake_engine(cuda, cuda_graph=cuda_graph, aux=True)
    np.testing.assert_array_equal(single.run_other(images, "mask"), fake_network(images)["mask"])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
def test_results_can_be_asked_for_in_any_order(cuda: FakeCuda, order: tuple[int, ...]) -> None:
    """More batches, and more pieces, than there are slots."""
    engine, _ = fake_engine(cuda, FOLDS, cuda_graph=True)
    batches = [pictures(number, seed=number) for number in (8, 3, 33, 16)]
    pending = [engine.submit(images) for images in batches]
    for index in order:
        assert_outputs(pending[index].result(), batches[index])
    assert pending[0].result()[0][0] is pending[0].result()[0][0], "copied out once"


@pytest.mark.parametrize("seed", range(3))
def test_submits_and_results_may_interleave(cuda: FakeCuda, seed: int) -> None:
    """Memory of images is rewritten as soon as their results are there."""
    engine, _ = fake_engine(cuda, FOLDS, cuda_graph=True)
    random = np.random.default_rng(seed)
    waiting: list[tuple[Any, np.ndarray[Any, Any]]] = []
    memory = [page_locked(cuda, pictures(40, seed=number)) for number in range(6)]
    for _ in range(40):
        if memory and (not waiting or random.random() < 0.6):
            images = memory.pop()
            images[:] = pictures(40, seed=int(random.integers(1000)))
            folds = random.permutation(FOLDS)[: random.integers(1, 4)].tolist()
            number = int(random.integers(1, 41))
            waiting.append((engine.submit(images[:number], folds), images[:number]))
        else:
            pending, images = waiting.pop(int(random.integers(len(waiting))))
            assert_outputs(pending.result(), images)
            memory.append(images.base if images.base is not None else images)
    engine.close()


def test_a_batch_is_copied_to_the_gpu_once_for_all_folds(cuda: FakeCuda) -> None:
    engine, fakes = fake_engine(cuda, FOLDS)
    engine.submit(pictures(21)).result()
    assert cuda.uploads == [8 * 48, 8 * 48, 5 * 48]
    assert [fake.batches for fake in fakes.values()] == [[8, 8, 8]] * 3
    outputs = engine.submit(pictures(8), folds=[4]).result()
    assert list(outputs) == [4]
    assert [len(fake.batches) for fake in fakes.values()] == [3, 3, 4]
    assert len(cuda.uploads) == 4


def test_the_host_waits_only_for_the_oldest_batch_and_only_if_no_slot_is_free(
    cuda: FakeCuda,
) -> None:
    engine, _ = fake_engine(cuda, FOLDS)
    images = page_locked(cuda, pictures(8))
    pending = [engine.submit(images) for _ in range(IN_FLIGHT)]
    assert cuda.waits == 0
    pending.append(engine.submit(images))
    assert cuda.waits == 1
    for index in (3, 2, 5):  # the slot of a later batch is free then
        before = cuda.waits
        pending[index].result()
        pending.append(engine.submit(images))
        assert cuda.waits == before + 1, "the submit does not wait"


def test_outputs_are_read_by_the_host_when_they_are_there(cuda: FakeCuda) -> None:
    """Until then the fake CUDA keeps other numbers in their memory."""
    engine, _ = fake_engine(cuda)
    pending = engine.submit(pictures(8))
    assert cuda.waits == 0
    assert_outputs(pending.result(), pictures(8))
    assert cuda.waits == 1


def test_results_may_be_asked_for_in_another_thread(cuda: FakeCuda) -> None:
    engine, _ = fake_engine(cuda, FOLDS)
    pending = [engine.submit(pictures(40, seed)) for seed in range(2)]
    outputs: list[Any] = []
    thread = threading.Thread(target=lambda: outputs.extend(each.result() for each in pending))
    thread.start()
    thread.join()
    for seed, output in enumerate(outputs):
        assert_outputs(output, pictures(40, seed))
    assert len(outputs) == 2


def test_a_batch_over_the_profile_goes_in_pieces_and_the_tail_is_padded(cuda: FakeCuda) -> None:
    engine, fakes = fake_engine(cuda)
    engine.run(pictures(21))
    assert fakes[0].batches == [8, 8, 8]  # the last with five images
    engine.run(pictures(16))
    assert fakes[0].batches[3:] == [16]


def test_folds_with_other_profiles_share_the_common_sizes(cuda: FakeCuda) -> None:
    plans = {0: FakePlan(profile=Profile(1, 8, 16)), 1: FakePlan(profile=Profile(4, 6, 8))}
    fakes = fake_engines(cuda, plans)
    engine = engine_of(fakes, plans)
    assert_right(engine, 13)
    assert [fake.batches for fake in fakes.values()] == [[6, 6, 4]] * 2
    plans[1] = FakePlan(profile=Profile(32, 32, 32))
    with pytest.raises(UserError, match=r"no batch size in common; export them again with one --"):
        engine_of(fakes, plans)


def test_the_full_batch_replays_a_cuda_graph(cuda: FakeCuda) -> None:
    engine, fakes = fake_engine(cuda, cuda_graph=True)
    recorded = len(fakes[0].batches)
    engine.run(pictures(40))
    assert cuda.replays == 5
    assert len(fakes[0].batches) == recorded
    engine.run(pictures(3))
    assert cuda.replays == 5
    assert fakes[0].batches[recorded:] == [4]


def test_a_graph_is_right_after_batches_of_other_sizes(cuda: FakeCuda) -> None:
    """The fake CUDA refuses to replay a graph whose context was used for something else."""
    engine, fakes = fake_engine(cuda, FOLDS, cuda_graph=True)
    for number in (40, 3, 40, 16, 1, 8, 61, 24):
        assert_right(engine, number)
    assert cuda.replays == len(FOLDS) * (5 + 5 + 1 + 8 + 3)
    for fake in fakes.values():
        assert len(fake.contexts) == 2 * IN_FLIGHT, "one for each slot and each slot's graph"


def test_only_the_plans_that_ask_for_it_are_recorded(cuda: FakeCuda) -> None:
    plans = {0: FakePlan(cuda_graph=True), 1: FakePlan()}
    fakes = fake_engines(cuda, plans)
    assert_right(engine_of(fakes, plans), 24)
    assert cuda.replays == 3
    assert fakes[1].batches == [8, 8, 8]


def test_a_shape_is_set_only_when_the_batch_changes(cuda: FakeCuda) -> None:
    engine, fakes = fake_engine(cuda)
    for number in (24, 24, 3, 3, 3, 24):
        assert_right(engine, number)
    assert [context.shapes for context in fakes[0].contexts] == [[8, 4, 8]] * 3


def test_contexts_of_all_folds_share_the_largest_scratch_memory(cuda: FakeCuda) -> None:
    _engine, fakes = fake_engine(cuda, FOLDS, cuda_graph=True)
    needs = {fake.device_memory_size_v2 for fake in fakes.values()}
    assert [size for size in sizes_on_device(cuda) if size in needs] == [max(needs)]


def test_kernels_are_kept_after_the_first_run_of_each_size(cuda: FakeCuda) -> None:
    engine, fakes = fake_engine(cuda, FOLDS)
    runs: list[int] = []
    for fold, plan in engine._plans.items():
        plan.save_kernels = lambda fold=fold: runs.append(len(fakes[fold].batches))  # type: ignore[method-assign]
    engine.submit(pictures(40)).result()
    assert runs == [1] * 3
    engine.submit(pictures(21)).result()
    engine.submit(pictures(3)).result()
    assert runs == [1] * 3 + [9] * 3


@pytest.mark.parametrize("fails_from", range(6))
def test_an_error_while_recording_ends_the_recording(cuda: FakeCuda, fails_from: int) -> None:
    """In the fake CUDA a stream that is left recording refuses all later calls."""
    plans = {0: FakePlan(cuda_graph=True), 1: FakePlan(cuda_graph=True)}
    fakes = fake_engines(cuda, plans)
    fakes[1].fails_from = fails_from
    with pytest.raises(CudaError, match="did not run a batch of 8: it gives no reason"):
        engine_of(fakes, plans)
    assert not any(stream.recording for stream in cuda.streams.values())
    gc.collect()
    assert not cuda.graphs
    assert not cuda.device
    fakes[1].fails_from = None
    assert_right(engine_of(fakes, plans), 21)


@pytest.mark.parametrize("fold", [0, 4])
@pytest.mark.parametrize("fails_from", [0, 1, 4])
@pytest.mark.parametrize("locked", [False, True])
def test_a_batch_that_fails_halfway_leaves_nothing_in_flight(
    cuda: FakeCuda, fold: int, fails_from: int, locked: bool
) -> None:
    """Batches before and after it are right, and its memory can be reused at once."""
    folds = (0, 4)
    engine, fakes = fake_engine(cuda, folds)
    lock = (lambda images: page_locked(cuda, images)) if locked else (lambda images: images)
    earlier = [lock(pictures(number, seed=number)) for number in (8, 3)]
    pending = [engine.submit(images) for images in earlier]
    fakes[fold].fails_from = len(fakes[fold].batches) + fails_from
    failing = lock(pictures(40, seed=1))
    with pytest.raises(UserError, match=r"the GPU failed \(TensorRT did not run a batch of 8"):
        engine.submit(failing)
    failing[:] = 0
    fakes[fold].fails_from = None
    for images in (failing, lock(pictures(61))):
        assert_outputs(engine.submit(images).result(), images)
    for each, images in zip(pending, earlier, strict=True):
        assert_outputs(each.result(), images)


def test_ctrl_c_during_a_submit_leaves_nothing_in_flight(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = fake_engine(cuda, FOLDS)
    images = page_locked(cuda, pictures(40))
    kept = engine.submit(images)
    replacement = pictures(40, seed=1)

    def interrupt(stream: Any, event: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cudart.Stream, "record", interrupt)
        engine.submit(images)
    images[:] = replacement
    assert_outputs(kept.result(), pictures(40))
    assert_outputs(engine.submit(images).result(), replacement)


def broken_in_result(engine: TensorRTEngine, pending: Any, images: np.ndarray[Any, Any]) -> None:
    pending.result()


def broken_in_submit(engine: TensorRTEngine, pending: Any, images: np.ndarray[Any, Any]) -> None:
    engine.submit(images)


@pytest.mark.parametrize("use", [broken_in_result, broken_in_submit])
def test_a_gpu_that_fails_gives_no_results_and_runs_nothing_more(
    cuda: FakeCuda, use: Callable[[TensorRTEngine, Any, Any], None]
) -> None:
    engine, _ = fake_engine(cuda, FOLDS)
    finished, first, second = (engine.submit(pictures(number)) for number in (8, 40, 3))
    expected = finished.result()
    cuda.is_broken = True
    message = r"the GPU failed \(.*illegal memory access\); run `python -m infer doctor`"
    with pytest.raises(UserError, match=message):
        use(engine, second, pictures(8))
    cuda.is_broken = False  # an error that CUDA returns once
    for pending in (first, second):
        with pytest.raises(UserError, match=message):
            pending.result()
    with pytest.raises(UserError, match=message):
        engine.submit(pictures(8))
    assert finished.result() == expected
    cuda.is_broken = True
    engine.close()


@pytest.mark.parametrize("use", [broken_in_result, broken_in_submit])
def test_outputs_are_not_trusted_after_an_error_that_cuda_forgets(
    cuda: FakeCuda, use: Callable[[TensorRTEngine, Any, Any], None]
) -> None:
    engine, _ = fake_engine(cuda, FOLDS)
    images = page_locked(cuda, pictures(8))
    pending = [engine.submit(images) for _ in range(IN_FLIGHT)]
    cuda.next_wait_fails = True
    for _ in range(2):
        with pytest.raises(UserError, match="illegal memory access"):
            use(engine, pending[0], images)
    for each in pending:
        with pytest.raises(UserError, match="illegal memory access"):
            each.result()


def test_full_memory_of_the_gpu_is_named(cuda: FakeCuda) -> None:
    plans = {0: FakePlan(), 1: FakePlan()}
    cuda.capacity = 4000
    with pytest.raises(CudaError, match="cudaMalloc failed: out of memory") as raised:
        engine_of(fake_engines(cuda, plans), plans)
    for error in (raised.value, CudaError("TensorRT did not run a batch: OutOfMemory")):
        assert "use a smaller --batch_size or fewer folds" in str(user_error(error))
    assert "doctor" in str(user_error(CudaError("an illegal memory access was encountered")))
    del raised, error
    gc.collect()
    assert not cuda.device


def test_page_locked_images_are_not_copied_on_the_host(cuda: FakeCuda) -> None:
    engine, _ = fake_engine(cuda)
    images = page_locked(cuda, pictures(9))
    for _ in range(IN_FLIGHT):
        engine.run(images[:8])  # allocates the memory of each slot's outputs
    before = len(cuda.host)
    engine.run(images[1:])
    assert len(cuda.host) == before
    for scattered in (images[::2], images[:, ::-1]):  # page-locked, not in one run of bytes
        assert_outputs({0: engine.run(scattered)}, scattered)
        assert len(cuda.host) > before


def test_images_in_flight_outlive_their_last_name(cuda: FakeCuda) -> None:
    """The fake CUDA refuses to free memory that is copied from."""
    engine, _ = fake_engine(cuda, FOLDS)
    pending = engine.submit(page_locked(cuda, pictures(21)))
    gc.collect()
    assert not cuda.misuses
    assert_outputs(pending.result(), pictures(21))
    gc.collect()
    assert 21 * 48 not in [array.size for array in cuda.host.values()], "freed after the result"


def test_images_that_only_begin_in_page_locked_memory_are_copied(cuda: FakeCuda) -> None:
    """Locked pages may hold the beginning of another array."""
    engine, _ = fake_engine(cuda)
    images = pictures(8)
    locked = page_locked(cuda, images[:4])
    assert cudart.is_pinned(locked)
    assert_outputs({0: engine.run(images)}, images)


def test_memory_is_freed_with_the_engine(cuda: FakeCuda) -> None:
    engine, _ = fake_engine(cuda, FOLDS, cuda_graph=True)
    engine.submit(pictures(40)).result()
    del engine
    gc.collect()
    assert not cuda.device
    assert not cuda.host
    assert not cuda.internal


def test_an_engine_lives_until_its_results_are_asked_for(cuda: FakeCuda) -> None:
    engine, _ = fake_engine(cuda, FOLDS)
    pending = engine.submit(pictures(21))
    del engine
    gc.collect()
    assert_outputs(pending.result(), pictures(21))


def test_an_engine_that_ends_waits_for_its_work(cuda: FakeCuda) -> None:
    """The fake CUDA refuses to free memory, or to end a context, that is in use."""
    engine, _ = fake_engine(cuda, FOLDS)
    engine.submit(page_locked(cuda, pictures(21)))
    del engine
    gc.collect()
    assert not cuda.device


def test_results_stay_after_the_engine_is_closed(cuda: FakeCuda) -> None:
    engine, _ = fake_engine(cuda, FOLDS)
    pending = engine.submit(pictures(21))
    engine.close()
    before = cuda.waits
    assert_outputs(pending.result(), pictures(21))
    assert cuda.waits == before
