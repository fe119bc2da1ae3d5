import re

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
