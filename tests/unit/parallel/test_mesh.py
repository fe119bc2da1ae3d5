import jax
import pytest

from visionfm_jax.parallel.mesh import make_mesh


@pytest.fixture
def _compile_cache():
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.usefixtures("_compile_cache")
def test_steps_of_cpus_are_not_read_back_from_the_compilation_cache():
    make_mesh()
    assert not jax.config.jax_enable_compilation_cache
