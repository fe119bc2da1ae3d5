"""What every test finds: eight virtual devices, set before JAX is imported anywhere, and signals at their defaults."""

import gc
import importlib.metadata
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if importlib.metadata.version("jax") < "0.11":  # which alone has the option: compiling takes 30 % less
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# A shell that starts the tests in the background has them ignore SIGINT, and with them every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Pieces of memory that Linux lets a process map, 65,530 as it comes. A program compiled without optimisations takes a
# thousand of them, and the one that finds none left aborts the process.
MAPS = Path("/proc/self/maps")
MANY = 20_000


# The files that take longest, longest first. launch/test.sh hands out whole files in this order, so that both workers
# are busy to the end and what the tests of a file share is made once; with --quick it leaves these out.
SLOW = (
    "e2e/test_pairs_runs.py",
    "e2e/test_documents_run.py",
    "e2e/test_crawl_runs.py",
    "distributed/test_contrastive_step.py",
    "e2e/test_aurora_runs.py",
    "distributed/test_compiled_clip.py",
    "e2e/test_faults.py",
    "unit/curation/test_dedup.py",
    "e2e/test_plan.py",
    "e2e/test_interruption.py",
    "distributed/test_compiled_zero.py",
    "distributed/test_backbones.py",
    "distributed/test_grad_cache.py",
    "distributed/test_loss_scaling.py",
    "distributed/test_processes.py",
    "distributed/test_compiled_aurora.py",
    "distributed/test_stages.py",
    "distributed/test_detection_step.py",
    "distributed/test_segmentation.py",
    "distributed/test_eomt_step.py",
    "distributed/test_context.py",
    "e2e/test_api.py",
    "e2e/test_ray.py",
    "distributed/test_frozen.py",
    "distributed/test_windowed_step.py",
    "distributed/test_self_distillation.py",
    "parity/test_swin_parity.py",
    "parity/test_dialect_parity.py",
    "parity/test_clip_parity.py",
    "parity/test_vit_parity.py",
    "parity/test_aurora_parity.py",
    "unit/test_export.py",
    "unit/test_loading.py",
    "unit/test_programs.py",
    "unit/models/test_swin_v2.py",
    "unit/models/test_aurora.py",
    "unit/models/test_vit.py",
    "unit/models/test_windowed_vit.py",
    "distributed/test_lost_processes.py",
    "distributed/test_layer_statistics.py",
    "distributed/test_compiled_traffic.py",
    "distributed/test_views.py",
    "unit/data/test_loader.py",
    "unit/test_layers.py",
    "unit/test_attacks.py",
    "e2e/test_notebooks.py",
)


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files of tests; those of a file stay together."""
    tests = Path(__file__).parent
    place = {tests / name: i for i, name in enumerate(SLOW)}
    if missing := [str(path) for path in place if not path.is_file()]:
        raise pytest.UsageError(f"SLOW in tests/conftest.py names files that are not there: {', '.join(missing)}")
    for item in items:
        if item.path in place:
            item.add_marker("slow")
    items.sort(key=lambda item: place.get(item.path, len(SLOW)))


@pytest.fixture(scope="module", autouse=True)
def _not_too_many_programs() -> Iterator[None]:
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """Programs compiled without most optimisations, for small networks: compiling takes nearly all of their time."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick_gpu_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Steps compiled for GPUs in half the time; those of a file are kept, and no others are found."""
    from gpu_compiles import without_softmax_kernels

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        with without_softmax_kernels(f"--xla_gpu_kernel_cache_file={folder / 'kernels'}"):
            yield
