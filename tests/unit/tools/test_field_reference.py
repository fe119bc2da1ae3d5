"""docs/configuration.md is what the classes of configurations say."""

import field_reference

from visionfm_jax.config import Config
from visionfm_jax.models.backbones.vit import ViTConfig


def test_the_page_is_up_to_date():
    assert field_reference.PAGE.read_text() == field_reference.page(), "run python tools/field_reference.py"


def test_every_class_is_there_with_the_fields_that_hold_it():
    found = field_reference.classes()
    assert found[Config] == ["config"]
    assert "config.model" in found[ViTConfig]
    places = {place for all_of in found.values() for place in all_of}
    assert {"config.data.train[i]", "config.evals[i].source", "config.optim", "config.task"} <= places
