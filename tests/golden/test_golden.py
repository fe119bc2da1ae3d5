import re

import jax
import pytest
from dump import CONFIGS, SHIPPED, dump, path_of


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_means_what_it_meant(name):
    assert dump(name) == path_of(name).read_text(), "if the change is meant: python tests/golden/dump.py"


def test_every_shipped_configuration_is_dumped():
    shipped = set()
    for path in CONFIGS.glob("*.py"):
        shipped.add(path.stem)
        variants = re.search(r"variant_of\(\(([^)]*)\)", path.read_text())
        shipped |= {f"{path.stem}:{v}" for v in re.findall(r'"(\w+)"', variants[1])}
    assert shipped == set(SHIPPED)


@pytest.mark.parametrize("name", [name for name in SHIPPED if ":tiny" not in name])
def test_weights_are_fp32_whatever_jax_is_told(name):
    """A program of one's own may have switched 64 bits on."""
    jax.config.update("jax_enable_x64", True)
    try:
        assert dump(name) == path_of(name).read_text()
    finally:
        jax.config.update("jax_enable_x64", False)
